"""Finds the decoder in a checkpoint's tensors, checks every shape, and makes the routers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pmod_cli.checkpoints.shards import StoredTensor
from pmod_cli.families import Family
from pmod_cli.families.defaults import PARTS
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

_REQUIRED = (
    "embed_tokens.weight",
    "multi_modal_projector.linear_1.weight",
    "multi_modal_projector.linear_2.weight",
)
"""Those of them that no family lacks."""

_STACKED = re.compile(r"(.*\.layers\.)(\d+)\.(.+)")

_CONFIG = "config.json (or its defaults)"

ROUTER_DTYPES = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class DecoderLayout:
    """Where the decoder layers are.

    Attributes:
        prefix: What stands before a layer's number in the names, e.g. ``model.language_model.layers.``.
        layers: Number of decoder layers.
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
    if "quantization_config" in config:
        raise _quantised()
    by_name = {tensor.name: tensor for tensor in tensors}
    prefix = next((p for p in family.layer_prefixes if any(name.startswith(p) for name in by_name)), None)
    if prefix is None:
        raise PmodError(
            "the weights have no decoder layers",
            f"expected names that begin with {' or '.join(family.layer_prefixes)}",
        )
    layers = 1 + max((int(match[2]) for match in _stacked(by_name) if match[1] == prefix), default=-1)
    text = _completed(config.get("text_config") or {}, family.decoders[0])
    expected = text.get("num_hidden_layers", layers)
    if expected != layers:
        raise PmodError(f"the weights have {layers} decoder layers, and {_CONFIG} says {expected}")
    needs_head = config.get("tie_word_embeddings") is False
    _check_complete(by_name, prefix, layers, (*_REQUIRED, "lm_head.weight") if needs_head else _REQUIRED)
    sample = by_name[f"{prefix}0.self_attn.q_proj.weight"]
    if sample.dtype not in ROUTER_DTYPES:
        raise _quantised()
    _check_shapes(by_name, prefix, _sides_of(text, config))
    return DecoderLayout(prefix, layers, sample.shape[1], sample.dtype)


def router_tensors(
    mod: MoDConfig, layout: DecoderLayout, given: dict[str, StoredTensor]
) -> list[StoredTensor]:
    """The routers of every Mixture-of-Depths layer: those given, or zeros in the decoder's dtype.

    Args:
        mod: Which layers, and whether routers have a bias.
        layout: Names, width and dtype.
        given: Routers that the source has, by name; all of them, or none.

    Raises:
        PmodError: A router is missing or has the wrong shape.
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


def _quantised() -> PmodError:
    hint = "convert the unquantised checkpoint and quantise when it is loaded"
    return PmodError("the weights are quantised", hint)


def _stacked(names: Iterable[str]) -> Iterator[re.Match[str]]:
    """Names inside a stack of layers: what stands before the layer's number, the number, the rest."""
    return filter(None, map(_STACKED.fullmatch, names))


def _check_complete(
    tensors: dict[str, StoredTensor], prefix: str, layers: int, others: Iterable[str]
) -> None:
    """Refuse weights that lack a tensor of a decoder layer, one that ends in one of ``others``, or see `_gaps`."""
    inside = [f"{prefix}{layer}.{end}" for layer in range(layers) for end in _LAYER]
    missing = [name for name in inside if name not in tensors]
    missing += [end for end in others if not any(name.endswith(end) for name in tensors)]
    missing = missing or _gaps(tensors)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise PmodError(f"the weights lack {missing[0]}{more}")


def _gaps(names: Iterable[str]) -> list[str]:
    """Names that a layer lacks and others of its stack have: for the vision tower, whose names differ by its kind."""
    stacks: dict[str, dict[str, set[int]]] = {}
    for match in _stacked(names):
        stacks.setdefault(match[1], {}).setdefault(match[3], set()).add(int(match[2]))
    return [
        f"{stack}{layer}.{end}"
        for stack, ends in stacks.items()
        for layer in range(1 + max(max(layers) for layers in ends.values()))
        for end, layers in ends.items()
        if layer not in layers
    ]


def _check_shapes(tensors: dict[str, StoredTensor], prefix: str, known: dict[str, tuple[int, str]]) -> None:
    """Compare every side with the config, or the first tensor that has it; and layers with each other.

    Args:
        tensors: All of them.
        prefix: Of the decoder layers.
        known: Sides that the config gives, each with where it stands; those of tensors are added.
    """
    first_layers: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        sides = _sides_by_name(name, prefix)
        if sides is not None and len(sides) != len(tensor.shape):
            raise PmodError(f"{name} has shape {list(tensor.shape)}, and {len(sides)} sides are expected")
        for length, side in zip(tensor.shape, sides or (), strict=False):
            expected, where = known.setdefault(side, (length, name))
            if length != expected:
                raise PmodError(
                    f"{name} has shape {list(tensor.shape)}: its {side} is {length}, and {expected} by {where}"
                )
        # Layers of one stack are alike: this finds what is wrong in parts whose sides have no names here.
        like = first_layers.setdefault(re.sub(r"\.layers\.\d+\.", ".layers.*.", name), tensor)
        if like.shape != tensor.shape:
            raise PmodError(f"{name} has shape {list(tensor.shape)}, and {like.name} has {list(like.shape)}")


def _sides_by_name(name: str, prefix: str) -> tuple[str, ...] | None:
    """What the sides of a tensor are called; None if it is not one of those that are checked."""
    match = _STACKED.fullmatch(name)
    if match and match[1] == prefix:
        return _LAYER.get(match[3])
    return next((sides for end, sides in _OUTSIDE.items() if name.endswith(end)), None)


def _sides_of(text: dict[str, Any], config: dict[str, Any]) -> dict[str, tuple[int, str]]:
    """The sides that the config gives, each with where it stands.

    Args:
        text: The language model's config, completed.
        config: The whole config.
    """
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
        layers = config.get("vision_feature_layer")
        sides["features"] = seen * (len(layers) if isinstance(layers, list) else 1)
    return {name: (value, _CONFIG) for name, value in sides.items() if isinstance(value, int)}


def _completed(part: dict[str, Any], kind: str) -> dict[str, Any]:
    """A part of the config with what transformers takes where it is silent."""
    return {**PARTS.get(part.get("model_type", kind), {}), **part}
