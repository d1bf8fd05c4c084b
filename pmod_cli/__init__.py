"""pmod: turn a multimodal LLM into a Mixture-of-Depths model (p-MoD, arXiv 2412.04449).

``import pmod_cli`` is enough to make transformers' Auto classes know the p-MoD model types. Neither torch
nor transformers is imported for that: the classes are registered at the moment transformers loads its Auto
machinery, or at once if it already has.
"""

import wrapt

__version__ = "0.1.0"


@wrapt.when_imported("transformers.models.auto")
def _register(_module: object) -> None:
    from pmod_cli.families import register_auto_classes

    register_auto_classes()
