"""pmod: turn a multimodal LLM into a Mixture-of-Depths model (p-MoD, arXiv 2412.04449).

``import pmod_cli`` is enough to make transformers' Auto classes know the p-MoD model types. Neither torch
nor transformers is imported for that: the classes are registered as soon as transformers itself is imported, or
at once if it already is.
"""

import importlib
import sys

import wrapt

__version__ = "0.1.0"


# The hook is on the top-level package: one on its Auto modules would run in the middle of the import of a model
# that uses them, and our subclasses would find that model half made.
@wrapt.when_imported("transformers")
def _register(_module: object) -> None:
    # One of our own modules may be what imports transformers. The families need it whole, so the half-made one is
    # forgotten and imported anew; the import system hands out what stands in sys.modules when it has finished.
    forgotten = [
        name
        for name, module in sys.modules.items()
        if name.startswith(("pmod_cli.modeling.", "pmod_cli.families."))
        and getattr(module.__spec__, "_initializing", False)
    ]
    for name in forgotten:
        del sys.modules[name]

    from pmod_cli.families import register_auto_classes

    register_auto_classes()
    for name in forgotten:
        importlib.import_module(name)
