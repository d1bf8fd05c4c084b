"""What was evaluated, with what: the checkpoint's fingerprint, the data and the versions in play."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transformers.image_processing_backends import PilBackend

import pmod_cli
from pmod_cli.checkpoints.load import read_config
from pmod_cli.checkpoints.source import open_source
from pmod_cli.families import find_family
from pmod_cli.output.errors import PmodError
from pmod_cli.output.versions import versions
from pmod_cli.prompts import Prompt

_CONTENT = ("*.json", "*.safetensors", "*.jinja", "*.bin", "*.model", "*.txt")


def fingerprint(source: str | Path) -> str:
    """SHA-256 over the contents of a checkpoint's files, weights included; where the folder is does not matter."""
    folder = open_source(source).folder
    files = sorted({path for pattern in _CONTENT for path in folder.glob(pattern)})
    with ThreadPoolExecutor(4) as pool:
        digests = pool.map(_digest_file, files)
    return digest([[path.name, value] for path, value in zip(files, digests, strict=True)])


def describe(source: Any) -> dict[str, Any]:
    """Name, fingerprint and kind of a checkpoint; a model in memory has no fingerprint."""
    if not isinstance(source, (str, Path)):
        model_type = source.model.config.model_type
        return {"source": type(source).__name__, "fingerprint": None, "model_type": model_type}
    config = open_source(source).config
    return {
        "source": str(source),
        "fingerprint": fingerprint(source),
        "model_type": config.get("model_type"),
        "retention_ratios": config["mod"]["retention_ratios"] if config.get("mod") else None,
    }


def describe_task(task: Any) -> dict[str, Any]:
    """What a loaded lmms-eval task is: its version, how it generates, and its data, with the version of their files."""
    docs = task.eval_docs
    # `datasets` names the folder of its copy after the files' versions: hub revision, or path and time.
    copies = sorted({"/".join(Path(entry["filename"]).parts[-4:-1]) for entry in docs.cache_files})
    return {
        "version": task.VERSION,
        "generation": task.config.generation_kwargs,
        "data": {
            "path": task.DATASET_PATH,
            "name": task.DATASET_NAME,
            "rows": len(docs),
            "copies": copies,
        },
    }


def preparation(processor: Any) -> dict[str, Any]:
    """How a processor makes a prompt: which back end and class, what becomes of a picture's shape, and digests."""
    images = processor.image_processor
    settings = {
        key: value for key, value in images.to_dict().items() if not key.endswith(("_type", "_class"))
    }
    shapes = {
        "image_grid_pinpoints": "tiles",
        "do_pad": "padded to a square",
        "do_center_crop": "cropped to a square",
    }
    return {
        "image_processor": type(images).__name__,
        "image_backend": "pil" if isinstance(images, PilBackend) else "torchvision",
        "pictures": next((shape for name, shape in shapes.items() if getattr(images, name, None)), "resized"),
        "image_settings": digest(settings)[:16],
        "chat_template": digest(processor.chat_template)[:16],
    }


def environment() -> dict[str, str]:
    """Versions of everything that has a say in a score."""
    packages = ("torch", "transformers", "lmms-eval", "datasets", "accelerate", "pillow", "torchvision")
    return {"pmod": pmod_cli.__version__} | versions(*packages)


def prompt_digest(prompt: Prompt, repeat: int) -> str:
    """What a prompt is kept by: its text, the pixels of pictures and videos, and how often it was asked before."""
    state = hashlib.sha256(json.dumps([prompt.text, repeat]).encode())
    for image in prompt.images:
        state.update(repr((image.mode, image.size)).encode())
        state.update(image.tobytes())
    for video in prompt.videos:
        state.update(repr((video.frames.shape, video.indices, video.total, video.fps)).encode())
        state.update(video.frames.tobytes())
    return state.hexdigest()[:16]


def digest(value: Any) -> str:
    """SHA-256 of anything that JSON can write."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _digest_file(path: Path) -> str:
    state = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            state.update(chunk)
    return state.hexdigest()


def task_name(source: Any) -> str:
    """What lmms-eval's tasks call a model's family; ``pmod`` too for what cannot be read, which is told later."""
    try:
        config = read_config(source) if isinstance(source, (str, Path)) else source.model.config
        return find_family(config.model_type, unlisted=True).task_name
    except PmodError:
        return "pmod"
