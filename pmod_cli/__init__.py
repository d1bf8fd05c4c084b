"""pmod: turn a multimodal LLM into a Mixture-of-Depths model (p-MoD, arXiv 2412.04449).

``import pmod_cli`` is enough to make transformers' Auto classes know the p-MoD model types. Neither torch nor
transformers is imported for that, and no model's code until a checkpoint of its family is opened.
"""

import wrapt

__version__ = "0.1.0"


def _register(auto_module: object) -> None:
    from pmod_cli.families import register_lazily

    register_lazily(auto_module)


for _name in ("configuration_auto", "processing_auto", "image_processing_auto"):
    wrapt.register_post_import_hook(_register, f"transformers.models.auto.{_name}")
