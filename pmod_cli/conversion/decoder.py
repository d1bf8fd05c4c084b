"""Finds the decoder in a checkpoint's tensors, checks every shape, and makes the routers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pmod_cli.checkpoints.shards import StoredTensor
from pmod_cli.families import Family, text_part
from pmod_cli.families.defaults import PARTS, complete
from pmod_cli.modeling.settings import MoDConfig
from pmod_cli.output.errors import PmodError

_LAYER = {
    "input_layernorm.weight": ("hidden_size",),
    "post_attention_layernorm.weight": ("hidden_size",),
    "self_attn.q_proj.weight": ("query width", "hidden_size"),
    "self_attn.k_proj.weight": ("key width", "hidden_size"),
    "self_attn.v_proj.weight": ("key width", "hidden_size"),
    "self_attn.o_proj.weight": ("hidden_size", "query width"),
    "mlp.gate_proj.weight": ("intermediate_size", "hidden_size"),
    "mlp.up_proj.weight": ("intermediate_size", "hidden_size"),
    "mlp.down_proj.weight": ("hidden_size", "intermediate_size"),
}
"""What every layer of a supported decoder has, and its sides by name."""

_OUTSIDE = {
    "embed_tokens.weight": ("vocab_size", "hidden_size"),
    "lm_head.weight": ("vocab_size", "hidden_size"),
    "multi_modal_projector.linear_1.weight": ("hidden_size", "features"),
    "multi_modal_projector.linear_2.weight": ("hidden_size", "hidden_size"),
    "image_newline": ("hidden_size",),
    "embeddings.class_embedding": ("vision hidden_size",),
    "embeddings.position_embedding.weight": ("vision positions", "vision hidden_size"),
}
"""Tensors outside the layers, by the end of their names."""

_STACKED = re.compile(r"(.*\.(?:layers?|blocks)\.)(\d+)\.(.+)")

_NORM = "input_layernorm.weight"

_CONFIG = "config.json (or its defaults)"

ROUTER_DTYPES = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class DecoderLayout:
    """Where the decoder layers are.

    Attributes:
        prefix: What stands before a layer's number in the names, e.g. ``model.language_model.layers.``.
        hidden: Width of the residual stream.
        dtype: Of the layers' weights, as safetensors calls it; the routers get the same.
    """

    prefix: str
    layers: int
    hidden: int
    dtype: str

    def router_name(self, layer: int, part: str) -> str:
        """Name of a router's ``weight`` or ``bias``."""
        return f"{self.prefix}{layer}.router.{part}"


def find_decoder(family: Family, config: dict[str, Any], tensors: Iterable[StoredTensor]) -> DecoderLayout:
    """Find the decoder layers and check that they are whole.

    Args:
        family: Says how the layers may be called.
        config: The dense config; the sizes that it gives, or leaves to transformers' defaults, have to be so.
        tensors: All of the checkpoint's.

    Raises:
        PmodError: No decoder, a missing tensor, a shape that does not fit, or quantised weights.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    # Layers by what stands before their numbers, and by what stands behind them.
    stacks: dict[str, dict[str, dict[int, StoredTensor]]] = {}
    for name, tensor in by_name.items():
        if match := _STACKED.fullmatch(name):
            stacks.setdefault(match[1], {}).setdefault(match[3], {})[int(match[2])] = tensor
    prefix = next((prefix for prefix in family.layer_prefixes if prefix in stacks), None)
    if prefix is None:
        raise PmodError(
            "the weights have no decoder layers",
            f"expected names that begin with {' or '.join(family.layer_prefixes)}",
        )
    layers = _count_layers(stacks[prefix])
    text = _completed(text_part(config), family.default_decoder)
    expected = text.get("num_hidden_layers", layers)
    if expected != layers:
        raise PmodError(f"the weights have {layers} decoder layers, and {_CONFIG} says {expected}")
    for end in _LAYER if family.listed else ():
        stacks[prefix].setdefault(end, {})
    required = ["embed_tokens.weight", *family.projector]
    if config.get("tie_word_embeddings") is False:
        required.append("lm_head.weight")
    missing = [
        *(end for end in required if not any(name.endswith(end) for name in by_name)),
        # Of the vision tower only this can be told, since its names differ by its kind.
        *(
            f"{stack}{layer}.{end}"
            for stack, ends in stacks.items()
            for layer in range(_count_layers(ends))
            for end, present in ends.items()
            if layer not in present
        ),
    ]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise PmodError(f"the weights lack {missing[0]}{more}")
    query = next(
        (stacks[prefix][end][0] for end in ("self_attn.q_proj.weight", _NORM) if stacks[prefix].get(end)),
        None,
    )
    if query is None:
        raise PmodError(
            f"the decoder's layers have no {_NORM}", "they are not laid out as pre-norm layers are"
        )
    weights = (tensor for name, tensor in by_name.items() if name.endswith((".weight", ".bias")))
    other = next((each for each in weights if each.dtype not in (*ROUTER_DTYPES, "F64")), None)
    if "quantization_config" in config or other or query.dtype not in ROUTER_DTYPES:
        which = f": {other.name} is {other.dtype}" if other else ""
        raise PmodError(f"the weights are quantised{which}", "convert the unquantised checkpoint")
    # What another family's sides are is only known to its classes (`check_shapes`).
    known = _sides_of(text, config) if family.listed else {}
    for name, tensor in by_name.items() if family.listed else ():
        if name.startswith(prefix):
            sides = _LAYER.get(name.removeprefix(prefix).partition(".")[2])
        else:
            sides = next((sides for end, sides in _OUTSIDE.items() if name.endswith(end)), None)
        _check_sides(tensor, sides, known)
    for stack, ends in stacks.items():
        if not family.listed and stack != prefix:
            continue  # a tower whose layers need not be alike
        for present in ends.values():
            # Finds what is wrong in parts whose sides have no names here.
            first, shape = present[0].name, list(present[0].shape)
            for tensor in present.values():
                if list(tensor.shape) != shape:
                    raise PmodError(f"{tensor.name} has shape {list(tensor.shape)}, and {first} has {shape}")
    return DecoderLayout(prefix, layers, query.shape[-1], query.dtype)


def router_tensors(
    mod: MoDConfig, layout: DecoderLayout, given: dict[str, StoredTensor]
) -> list[StoredTensor]:
    """The routers of every Mixture-of-Depths layer: zeros in the decoder's dtype, or those given by name.

    All must be given and have the right shape, or none.
    """
    shapes = {"weight": (1, layout.hidden)} | ({"bias": (1,)} if mod.router_bias else {})
    tensors = []
    for layer in mod.mod_layers:
        for part, shape in shapes.items():
            name = layout.router_name(layer, part)
            if not given:
                tensors.append(StoredTensor.zeros(name, layout.dtype, shape))
                continue
            tensor = given.get(name)
            if tensor is None or tensor.shape != shape:
                what = (
                    "is missing" if tensor is None else f"has shape {list(tensor.shape)}, not {list(shape)}"
                )
                raise PmodError(f"the {part} of layer {layer}'s router {what} in the source")
            tensors.append(tensor)
    return tensors


def _count_layers(ends: dict[str, dict[int, StoredTensor]]) -> int:
    return 1 + max(layer for present in ends.values() for layer in present)


def _check_sides(
    tensor: StoredTensor, sides: tuple[str, ...] | None, known: dict[str, tuple[int, str]]
) -> None:
    """Compare a tensor's sides with those known, each with where it stands; sides not known yet are added."""
    if sides is not None and len(sides) != len(tensor.shape):
        raise PmodError(f"{tensor.name} has shape {list(tensor.shape)}, and {len(sides)} sides are expected")
    for length, side in zip(tensor.shape, sides or (), strict=False):
        expected, where = known.setdefault(side, (length, tensor.name))
        if length != expected:
            raise PmodError(
                f"{tensor.name} has shape {list(tensor.shape)}: its {side} is {length}, "
                f"and {expected} by {where}"
            )


def _sides_of(text: dict[str, Any], config: dict[str, Any]) -> dict[str, tuple[int, str]]:
    """The sides that a config gives, each with where it stands. ``text``: the language model's part, completed."""
    vision = _completed(config.get("vision_config") or {}, "")
    heads = text.get("num_attention_heads")
    head = text.get("head_dim")
    if head is None and heads and text.get("hidden_size"):
        head = text["hidden_size"] // heads
    sides = {name: text.get(name) for name in ("hidden_size", "intermediate_size", "vocab_size")}
    if heads and head:
        sides["query width"] = heads * head
        sides["key width"] = (text.get("num_key_value_heads") or heads) * head
    sides["vision hidden_size"] = seen = vision.get("hidden_size")
    if isinstance(seen, int):
        layers = config.get("vision_feature_layers") or config.get("vision_feature_layer")
        merged = round(1 / complete(config).get("downsample_ratio", 1)) ** 2  # patches to a token
        sides["features"] = seen * merged * (len(layers) if isinstance(layers, list) else 1)
    return {name: (value, _CONFIG) for name, value in sides.items() if isinstance(value, int)}


def _completed(part: dict[str, Any], kind: str) -> dict[str, Any]:
    """A part of the config with what transformers takes where it is silent."""
    return {**PARTS.get(part.get("model_type", kind), {}), **part}
