"""The CLIP vision tower of a LLaVA: inside the checkpoint, beside it, or a part of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmod_cli.checkpoints.shards import StoredTensor
from pmod_cli.checkpoints.source import open_source
from pmod_cli.conversion.formats.llava_config import tower_config
from pmod_cli.conversion.formats.llava_keys import is_buffer, tower_key
from pmod_cli.output.errors import PmodError

_LARGE: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_channels": 3,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 768,
}
KNOWN = {
    "clip-vit-large-patch14-336": _LARGE | {"image_size": 336},
    "clip-vit-large-patch14": _LARGE | {"image_size": 224},
}
"""Geometry of OpenAI's towers, which LLaVA checkpoints name; one that holds the weights then needs no download."""

PREFIX = "model.vision_tower."


@dataclass(frozen=True)
class Tower:
    """A vision tower.

    Attributes:
        config: Its transformers config.
        images: Its ``preprocessor_config.json``, or None.
        tensors: Its weights in transformers' names; empty if the checkpoint itself holds them.
    """

    config: dict[str, Any]
    images: dict[str, Any] | None
    tensors: Sequence[StoredTensor] = ()


def find_tower(
    name: str | None, *, inside: bool, near: Path | None, allow_pickle: bool, chosen: bool = False
) -> Tower:
    """Find a vision tower by the name that a checkpoint's config or the user gives.

    Args:
        name: Folder (also relative to ``near``) or hub id.
        inside: Whether the checkpoint holds the weights; then those of the tower that is found do not count.
        near: The checkpoint's folder.
        allow_pickle: Whether pickled weights may be loaded.
        chosen: Whether the user named it.

    Raises:
        PmodError: It cannot be found, is no CLIP tower, or lacks weights.
    """
    if not name:
        raise PmodError("the checkpoint names no vision tower", "--vision-tower: a folder or a hub id")
    known = KNOWN.get(Path(name).name)
    local = _find_folder(name, near, chosen)
    if inside and known and local is None and not chosen:
        return Tower(known, None)
    try:
        source = open_source(local or name, allow_pickle=allow_pickle)
    except PmodError as error:
        raise PmodError(f"vision tower: {error.message}", "--vision-tower: a folder or a hub id") from error
    config = tower_config(source.config, name)
    images = source.json("preprocessor_config.json")
    if inside:
        return Tower(config, images)
    tensors = []
    for file in source.weight_files(allow_pickle):
        for stored in file.tensors.values():
            key = None if is_buffer(stored.name) else tower_key(stored.name)
            if key and key.name:
                tensors.append(stored.renamed(key.name))
    return Tower(config, images, tensors)


def _find_folder(name: str, near: Path | None, chosen: bool) -> Path | None:
    """Where a tower lies: what the user names from where they are, what a checkpoint names inside it or beside it."""
    here, beside = [Path(name).expanduser()], [near / name, near.parent / name] if near else []
    return next((path for path in (here + beside if chosen else beside + here) if path.is_dir()), None)


def check_tower(config: dict[str, Any], tensors: Iterable[StoredTensor]) -> None:
    """Check that a tower's weights are whole and fit its config.

    Args:
        config: Its transformers config.
        tensors: Its weights in transformers' names; others do not matter.

    Raises:
        PmodError: One is missing or has another shape.
    """
    found = {tensor.name: tensor.shape for tensor in tensors if tensor.name.startswith(PREFIX)}
    for name, shape in _shapes(config).items():
        actual = found.get(PREFIX + name)
        if actual is None:
            raise PmodError(f"the vision tower's weights lack {name}")
        if actual != shape:
            raise PmodError(
                f"the vision tower's {name} has shape {list(actual)}, and its config says {list(shape)}"
            )


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    width, inner = config["hidden_size"], config.get("intermediate_size", 4 * config["hidden_size"])
    patch, channels = config["patch_size"], config.get("num_channels", 3)
    positions = (config["image_size"] // patch) ** 2 + 1
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, channels, patch, patch),
        "embeddings.position_embedding.weight": (positions, width),
    }
    for norm in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"{norm}.{part}": (width,) for part in ("weight", "bias")}
    for layer in range(config.get("num_hidden_layers", 12)):
        prefix = f"encoder.layers.{layer}."
        matrices = {f"self_attn.{side}_proj": (width, width) for side in ("q", "k", "v", "out")}
        matrices |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
        for name, shape in matrices.items():
            shapes |= {f"{prefix}{name}.weight": shape, f"{prefix}{name}.bias": shape[:1]}
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{prefix}{norm}.{part}": (width,) for part in ("weight", "bias")}
    return shapes
