"""Parameter names of the original LLaVA code and of the p-MoD release, in transformers' terms."""

from __future__ import annotations

import re
from dataclasses import dataclass

_ROUTER = re.compile(r"model\.layers\.(\d+)\.router\.router\.(weight|bias)")
_LAYER = re.compile(
    r"model\.layers\.(\d+)\.(?:decoder_layer\.)?((?:self_attn|mlp|input_layernorm|post_attention_layernorm)\..+)"
)
_PROJECTOR = re.compile(r"(?:.*\.)?mm_projector\.([02])\.(weight|bias)")
_TOWER = re.compile(
    r"(?:model\.vision_tower\.)?(?:vision_tower\.)?(?:vision_model\.)?((?:embeddings|pre_layrnorm|encoder|post_layernorm)\..+)"
)
_DECODER = re.compile(r"model\.(embed_tokens\.weight|norm\.weight)")
_BUFFERS = ("rotary_emb.inv_freq", "embeddings.position_ids")


@dataclass(frozen=True)
class Key:
    """What a parameter is.

    Attributes:
        name: Its name in transformers' LLaVA; None for a router.
        layer: The decoder layer of a router; None for any other parameter.
        part: ``weight`` or ``bias`` of a router.
    """

    name: str | None
    layer: int | None = None
    part: str = ""


def parse_key(name: str) -> Key | None:
    """Read a parameter name of a checkpoint that the original LLaVA code or the p-MoD release wrote.

    Args:
        name: For example ``model.layers.8.decoder_layer.mlp.up_proj.weight``.

    Returns:
        Its meaning; None if neither code has such a parameter.
    """
    if match := _ROUTER.fullmatch(name):
        return Key(None, int(match[1]), match[2])
    if match := _LAYER.fullmatch(name):
        return Key(f"model.language_model.layers.{int(match[1])}.{match[2]}")
    if match := _DECODER.fullmatch(name):
        return Key(f"model.language_model.{match[1]}")
    if name.startswith("model.mm_projector."):
        return projector_key(name)
    if name in ("lm_head.weight", "model.image_newline"):
        return Key(name)
    return tower_key(name) if name.startswith("model.vision_tower.") else None


def projector_key(name: str) -> Key | None:
    """Read a parameter name of a projector, whether in a whole checkpoint or in ``mm_projector.bin``."""
    match = _PROJECTOR.fullmatch(name)
    return match and Key(f"model.multi_modal_projector.linear_{int(match[1]) // 2 + 1}.{match[2]}")


def tower_key(name: str) -> Key | None:
    """Read a parameter name of a CLIP vision tower, in a LLaVA checkpoint or in one of its own.

    A whole CLIP model has a text half besides, which gives None.
    """
    match = _TOWER.fullmatch(name)
    return match and Key(f"model.vision_tower.{match[1]}")


def is_buffer(name: str) -> bool:
    """Whether an old checkpoint wrote something under this name that models make by themselves."""
    return name.endswith(_BUFFERS)
