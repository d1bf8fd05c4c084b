"""Weights of the original LLaVA code and of the p-MoD release: names, vision tower, a row for the image token."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pmod_cli.checkpoints.shards import StoredTensor, decode, encode, read_header, read_pickle
from pmod_cli.checkpoints.source import Source, open_source
from pmod_cli.conversion.formats.llava_config import tower_config
from pmod_cli.families.defaults import CLIP_LARGE_336
from pmod_cli.output.errors import PmodError
from pmod_cli.output.paths import user_path

TOWER = "model.vision_tower."
EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
NEWLINE = "model.image_newline"
PROJECTOR = tuple(
    f"model.multi_modal_projector.linear_{number}.{part}" for number in (1, 2) for part in ("weight", "bias")
)

MULTIPLE = 64
"""Tables grow to a multiple of this, as llava-hf's do: matrix units want it."""

_BUFFERS = ("rotary_emb.inv_freq", "embeddings.position_ids")
_NAMES = (
    (r"model\.layers\.([0-9]+)\.router\.router\.(weight|bias)", r"model.language_model.layers.\1.router.\2"),
    (
        r"model\.layers\.([0-9]+)\.(?:decoder_layer\.)?"
        r"((?:self_attn|mlp|input_layernorm|post_attention_layernorm)\..+)",
        r"model.language_model.layers.\1.\2",
    ),
    (r"model\.(embed_tokens\.weight|norm\.weight)", r"model.language_model.\1"),
    (r"(lm_head\.weight|model\.image_newline)", r"\1"),
    (r"model\.mm_projector\.0\.(weight|bias)", r"model.multi_modal_projector.linear_1.\1"),
    (r"model\.mm_projector\.2\.(weight|bias)", r"model.multi_modal_projector.linear_2.\1"),
    (
        r"(model\.vision_tower\.)(?:vision_tower\.)?(?:vision_model\.)?"
        r"((?:embeddings|pre_layrnorm|encoder|post_layernorm)\..+)",
        r"\1\2",
    ),
)
"""Names of LLaVA's code, and transformers' for them."""

_LARGE = {
    "model_type": "clip_vision_model",
    **CLIP_LARGE_336,
    "num_attention_heads": 16,
    "projection_dim": 768,
}
_KNOWN_TOWERS = {
    "clip-vit-large-patch14-336": _LARGE,
    "clip-vit-large-patch14": _LARGE | {"image_size": 224},
}
"""Geometry of OpenAI's towers, which LLaVA checkpoints name: one that holds the weights then needs no download."""


def parse_key(name: str) -> str | None:
    """Transformers' name of a parameter that the original LLaVA code or the p-MoD release wrote; None for any other.

    For example ``model.language_model.layers.8.router.weight`` of ``model.layers.8.router.router.weight``.
    """
    matches = ((re.fullmatch(pattern, name), ours) for pattern, ours in _NAMES)
    return next((match.expand(ours) for match, ours in matches if match), None)


def tower_key(name: str) -> str | None:
    """Transformers' name of a parameter in a CLIP checkpoint; None in its text half."""
    return parse_key(TOWER + name)


def is_buffer(name: str) -> bool:
    """Whether old checkpoints have something under this name that models compute themselves."""
    return name.endswith(_BUFFERS)


def read_weights(source: Source, allow_pickle: bool) -> list[list[StoredTensor]]:
    """The weights of a checkpoint, file by file, in transformers' names, routers included; others are refused."""
    files = []
    for file in source.weight_files(allow_pickle):
        tensors = []
        for stored in file.tensors.values():
            if is_buffer(stored.name):
                continue
            name = parse_key(stored.name)
            if name is None:
                raise PmodError(f"{file.name} has {stored.name}, which is not a parameter of this format")
            tensors.append(stored.renamed(name))
        files.append(tensors)
    return files


class Tower(NamedTuple):
    """A vision tower.

    Attributes:
        config: Its transformers config.
        images: Its ``preprocessor_config.json``, or None.
        tensors: Its weights in transformers' names; empty if the checkpoint itself holds them.
    """

    config: dict[str, Any]
    images: dict[str, Any] | None
    tensors: tuple[StoredTensor, ...] = ()


def find_tower(
    name: str | None, *, inside: bool, near: Path | None, allow_pickle: bool, chosen: bool = False
) -> Tower:
    """Find a vision tower: a folder or hub id that a checkpoint's config names or, where it is ``chosen``, the user.

    Where the weights are ``inside`` the checkpoint, those of the tower that is found are not used. ``near`` is the
    checkpoint's folder.

    Raises:
        PmodError: It cannot be found, is no CLIP tower, or lacks weights.
    """
    if not name:
        raise PmodError("the checkpoint names no vision tower", "--vision-tower: a folder or a hub id")
    # What the user names lies where they are; what a checkpoint names lies inside it or beside it, nowhere else.
    own, here = chosen or near is None, user_path(name)
    places = [here] if own else []
    if near and not here.is_absolute() and ".." not in here.parts:
        places += [near / name, near.parent / name]
    local = next((path for path in places if path.is_dir()), None)
    known = _KNOWN_TOWERS.get(Path(name).name)
    if inside and known and local is None and not chosen:
        return Tower(known, None)
    if local is None and not own and here.exists():
        raise PmodError(
            f"the checkpoint names a vision tower outside its folder: {name}",
            f"--vision-tower {name}, if you trust it",
        )
    try:
        source = open_source(local or name, allow_pickle=allow_pickle)
    except PmodError as error:
        raise PmodError(f"vision tower: {error.message}", "--vision-tower: a folder or a hub id") from error
    config, images = tower_config(source.config, name), source.json("preprocessor_config.json")
    if inside:
        return Tower(config, images)
    stored = [tensor for file in source.weight_files(allow_pickle) for tensor in file.tensors.values()]
    named = [(tower_key(tensor.name), tensor) for tensor in stored if not is_buffer(tensor.name)]
    return Tower(config, images, tuple(tensor.renamed(key) for key, tensor in named if key))


def read_projector(name: str, near: Path, allow_pickle: bool) -> list[StoredTensor]:
    """The projector's four tensors, in transformers' names and in the order of `PROJECTOR`.

    It is a file, a folder that has ``mm_projector.safetensors`` or ``.bin``, or a hub id; first ``near`` is looked in.
    """
    path = next((path for path in (near / name, user_path(name)) if path.is_file()), None)
    if path is None:
        folder = open_source(name, near=near, allow_pickle=allow_pickle).folder
        names = ("mm_projector.safetensors", "mm_projector.bin")
        path = next((folder / name for name in names if (folder / name).is_file()), None)
        if path is None:
            raise PmodError(f"{name} has no {' or '.join(names)}")
    stored = read_header(path) if path.suffix == ".safetensors" else read_pickle(path, allow_pickle)
    found = {}
    for name, tensor in stored.items():
        key = parse_key(f"model.mm_projector.{name.rpartition('mm_projector.')[2]}")
        if key and "mm_projector." in name:
            found[key] = tensor.renamed(key)
    if set(found) != set(PROJECTOR):
        raise PmodError(
            f"{path} is no mlp2x_gelu projector", f"it has {', '.join(sorted(stored)[:6]) or 'nothing'}"
        )
    return [found[name] for name in PROJECTOR]


def rows_needed(rows: int, token: int) -> int:
    """Rows of a table that has to hold a token, unchanged if it does."""
    return rows if token < rows else -(-(token + 1) // MULTIPLE) * MULTIPLE


def with_mean_rows(tensor: StoredTensor, rows: int) -> StoredTensor:
    """The same table, [old rows, hidden], with copies of the mean of its rows appended, computed while it is copied.

    In the output layer a mean row's logit is the mean of all logits, so that greedy decoding never picks it; in
    the embedding table image features take its place.
    """
    old, width = tensor.shape
    if old >= rows:
        return tensor
    if tensor.dtype not in ("F32", "F16", "BF16"):
        raise PmodError(f"{tensor.name} is of type {tensor.dtype}, expected F32, F16 or BF16")

    def chunks() -> Iterator[bytes]:
        total, rest = np.zeros(width), b""
        for chunk in tensor.chunks():
            data = rest + bytes(chunk)
            whole = len(data) - len(data) % (tensor.nbytes // old)  # a piece need not end where a row ends
            total += np.sum(decode(data[:whole], tensor.dtype).reshape(-1, width), axis=0, dtype=np.float64)
            yield data[:whole]
            rest = data[whole:]
        yield encode((total / old).astype(np.float32), tensor.dtype) * (rows - old)

    return replace(tensor, shape=(rows, width), chunks=chunks)
