"""pmod: turn a multimodal LLM into a Mixture-of-Depths model (p-MoD, arXiv 2412.04449).

``import pmod_cli`` is enough to make transformers' Auto classes know the p-MoD model types. Neither torch nor
transformers is imported for that, and no model's code until a checkpoint of its family is opened.
"""

import importlib
import importlib.machinery
import os
import signal
import sys
import warnings
from types import ModuleType
from typing import Any

if sys.argv[:1] == ["-m"] and "pmod_cli" in sys.orig_argv:
    # ``python -m pmod_cli``: Ctrl-C before `pmod_cli.__main__` sees to it; what follows takes a while.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

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
        # The class itself is the loader; mypy wants an object of it.
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


def _register(auto_module: object) -> None:
    from pmod_cli.families import register_lazily

    register_lazily(auto_module)


for _name in ("configuration_auto", "processing_auto", "image_processing_auto"):
    wrapt.register_post_import_hook(_register, f"transformers.models.auto.{_name}")
