"""pmod: turn a multimodal LLM into a Mixture-of-Depths model (p-MoD, arXiv 2412.04449).

``import pmod_cli`` is enough to make transformers' Auto classes know the p-MoD model types. Neither torch
nor transformers is imported for that: the classes are registered as soon as transformers itself is imported, or
at once if it already is.
"""

import importlib
import importlib.machinery
import sys
import warnings
from types import ModuleType
from typing import Any

import wrapt

__version__ = "0.1.0"

_MOVED = {
    f"pmod_cli.training.{name}": f"pmod_cli.data.{name}"
    for name in ("chat", "dataset", "pictures", "records")
}
_MOVED |= {
    "pmod_cli.demo.run": "pmod_cli.demo.job",
    "pmod_cli.evaluation.run": "pmod_cli.evaluation.evaluate",
    "pmod_cli.training.check": "pmod_cli.data.check",
    "pmod_cli.training.collate": "pmod_cli.data.batches",
    "pmod_cli.training.run": "pmod_cli.training.finetune",
}


class _Moved:
    """Imports a module under the name that it had before; scripts have it."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, _Moved) if name in _MOVED else None  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: Any) -> None:
        return None

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        new = _MOVED[module.__name__]
        warnings.warn(f"{module.__name__} is now {new}", DeprecationWarning, stacklevel=2)
        sys.modules[module.__name__] = importlib.import_module(new)  # the import system hands this out


sys.meta_path.append(_Moved)


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
