"""Parts, which is how the paper trains: a language model, a vision tower and the projector of LLaVA's first stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pmod_cli.checkpoints.pickles import read_pickle
from pmod_cli.checkpoints.shards import StoredTensor, encode, read_header
from pmod_cli.checkpoints.source import Source, open_source
from pmod_cli.conversion.formats.llava import assemble
from pmod_cli.conversion.formats.llava_config import NEXT_GRIDS
from pmod_cli.conversion.formats.llava_weights import (
    NEWLINE,
    PROJECTOR,
    find_tower,
    projector_key,
    read_weights,
)
from pmod_cli.conversion.formats.translation import Options, Translation
from pmod_cli.output.errors import PmodError

_DECODERS = ("llama", "mistral", "qwen2")
_NEWLINE_SEED = 0


def matches(source: Source) -> bool:
    """Whether the source is a language model alone."""
    return source.model_type in _DECODERS


def translate(source: Source, options: Options) -> Translation:
    """Put the parts together as LLaVA's training code does."""
    tower_name = options.vision_tower or options.parts.get("vision_tower")
    projector_name = options.projector or options.parts.get("projector")
    if not tower_name or not projector_name:
        raise PmodError(
            f"{source.name} is a language model alone",
            "--vision-tower and --projector name the other parts, e.g. openai/clip-vit-large-patch14-336 and "
            "mm_projector.bin",
        )
    tiled = options.family == "llava_next"
    files = read_weights(source, options.allow_pickle)
    hidden = int(source.config["hidden_size"])
    projector = read_projector(projector_name, source.folder, options.allow_pickle)
    tower = find_tower(tower_name, inside=False, near=None, allow_pickle=options.allow_pickle)
    notes, extra = [], [*projector, *tower.tensors]
    if tiled:
        dtype = projector[0].dtype if projector[0].dtype in ("F16", "BF16") else "F32"
        numbers = np.random.default_rng(_NEWLINE_SEED).standard_normal(hidden) / np.sqrt(hidden)
        data = encode(numbers.astype(np.float32), dtype)
        extra.append(StoredTensor.from_bytes(NEWLINE, dtype, (hidden,), data))
        notes.append("image_newline starts with random numbers, as in LLaVA-NeXT's training")
    side = tower.config["image_size"]
    flat: dict[str, Any] = {
        **source.config,
        "mm_projector_type": "mlp2x_gelu",
        "image_aspect_ratio": "anyres" if tiled else "pad",
        "mm_patch_merge_type": "spatial_unpad" if tiled else "flat",
        "image_grid_pinpoints": [[across * side, down * side] for across, down in NEXT_GRIDS],
    }
    return assemble(source, options, source.model_type, flat, [*files, extra], tower, None, notes)


def read_projector(name: str, near: Path, allow_pickle: bool) -> list[StoredTensor]:
    """The projector's four tensors, in transformers' names and in the order of `PROJECTOR`.

    Args:
        name: A file, a folder that has ``mm_projector.safetensors`` or ``mm_projector.bin``, or a hub id.
        near: Where to look for it first.
        allow_pickle: Whether ``mm_projector.bin`` may be loaded.

    Raises:
        PmodError: It is not found, or is no two-layer projector.
    """
    path = next((path for path in (near / name, Path(name).expanduser()) if path.is_file()), None)
    if path is None:
        folder = open_source(name, near=near, allow_pickle=allow_pickle).folder
        names = ("mm_projector.safetensors", "mm_projector.bin")
        path = next((folder / name for name in names if (folder / name).is_file()), None)
        if path is None:
            raise PmodError(f"{name} has no {' or '.join(names)}")
    stored = read_header(path) if path.suffix == ".safetensors" else read_pickle(path, allow_pickle)
    named = ((projector_key(tensor.name), tensor) for tensor in stored.values())
    found = {key: tensor.renamed(key) for key, tensor in named if key}
    if set(found) != set(PROJECTOR):
        raise PmodError(
            f"{path} is no mlp2x_gelu projector", f"it has {', '.join(sorted(stored)[:6]) or 'nothing'}"
        )
    return [found[name] for name in PROJECTOR]
