"""What was evaluated, with what: the checkpoint's fingerprint and the versions in play."""

from __future__ import annotations

import hashlib
import json
import platform
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers.image_processing_backends import PilBackend

import pmod_cli
from pmod_cli.checkpoints.load import check_source
from pmod_cli.checkpoints.source import open_source
from pmod_cli.output.errors import PmodError

_CONTENT = ("*.json", "*.safetensors", "*.jinja", "*.bin", "*.model", "*.txt")
_PACKAGES = ("torch", "transformers", "lmms-eval", "datasets", "accelerate", "pillow", "torchvision")


def checkpoint_folder(source: str | Path) -> Path:
    """The folder that a checkpoint is in: itself, or the hub's copy of it, which is downloaded if need be.

    Raises:
        PmodError: If there is no such checkpoint, or the hub does not give it.
    """
    check_source(source)
    path = Path(source)
    return path if path.is_dir() else open_source(str(source)).folder


def fingerprint(source: str | Path) -> str:
    """SHA-256 over the contents of a checkpoint's files, weights included; where the folder is does not matter."""
    folder = checkpoint_folder(source)
    files = sorted({path for pattern in _CONTENT for path in folder.glob(pattern)})
    with ThreadPoolExecutor(4) as pool:
        digests = pool.map(_digest_file, files)
    return digest([[path.name, value] for path, value in zip(files, digests, strict=True)])


def describe(source: Any) -> dict[str, Any]:
    """Name, fingerprint and kind of a checkpoint; a model in memory has no fingerprint."""
    if not isinstance(source, (str, Path)):
        config = source.model.config
        return {"source": type(source).__name__, "fingerprint": None, "model_type": config.model_type}
    try:
        config = json.loads((checkpoint_folder(source) / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise PmodError(f"the config.json of {source} is not JSON: {error}") from None
    mod = config.get("mod")
    return {
        "source": str(source),
        "fingerprint": fingerprint(source),
        "model_type": config.get("model_type"),
        "retention_ratios": mod["retention_ratios"] if mod else None,
    }


def preparation(processor: Any) -> dict[str, Any]:
    """How a processor makes a prompt: which back end and class, what becomes of a picture's shape, and digests."""
    images = processor.image_processor
    settings = {
        key: value for key, value in images.to_dict().items() if not key.endswith(("_type", "_class"))
    }
    if getattr(images, "image_grid_pinpoints", None):
        shape = "tiles"
    elif getattr(images, "do_pad", False):
        shape = "padded to a square"
    else:
        shape = "cropped to a square" if getattr(images, "do_center_crop", False) else "resized"
    return {
        "image_processor": type(images).__name__,
        "image_backend": "pil" if isinstance(images, PilBackend) else "torchvision",
        "pictures": shape,
        "image_settings": digest(settings)[:16],
        "chat_template": digest(processor.chat_template)[:16],
    }


def data_of(task: Any) -> dict[str, Any]:
    """What a loaded lmms-eval task's data is: where from, how much, and which version of the files."""
    docs = task.eval_docs
    # `datasets` names the folder of its copy after the files' versions: hub revision, or path and time.
    copies = sorted({"/".join(Path(entry["filename"]).parts[-4:-1]) for entry in docs.cache_files})
    return {"path": task.DATASET_PATH, "name": task.DATASET_NAME, "rows": len(docs), "copies": copies}


def environment() -> dict[str, Any]:
    """Versions of everything that has a say in a score."""
    found: dict[str, str | None] = {"pmod": pmod_cli.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def digest(value: Any) -> str:
    """SHA-256 of anything that JSON can write."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _digest_file(path: Path) -> str:
    state = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            state.update(chunk)
    return state.hexdigest()
