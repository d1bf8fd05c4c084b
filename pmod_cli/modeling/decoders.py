"""Language models with Mixture-of-Depths layers: the transformers classes, subclassed.

A decoder whose layers are pre-norm (``input_layernorm``, ``self_attn``, ``post_attention_layernorm``, ``mlp``) is
two classes and one line in `DECODERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import LlamaModel, MistralModel, PreTrainedModel, Qwen2Model
from transformers import initialization as init
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from pmod_cli.modeling.layer import MoDDecoderLayer
from pmod_cli.modeling.router import Router
from pmod_cli.modeling.settings import MoDConfig


def take_over(dense: nn.Module, build: Callable[[], Any]) -> Any:
    """A new module of a subclass that holds the dense module's own children and parameters.

    Args:
        dense: The module to take over; its tensors are shared, not copied.
        build: Makes the new module; called on the meta device, so that it costs nothing.
    """
    with torch.device("meta"):
        module = build()
    for name, child in dense.named_children():
        setattr(module, name, child)
    for name, parameter in dense.named_parameters(recurse=False):
        setattr(module, name, parameter)
    return module


class MoDLlamaDecoderLayer(MoDDecoderLayer, LlamaDecoderLayer):
    """Llama and Vicuna."""


class MoDMistralDecoderLayer(MoDDecoderLayer, MistralDecoderLayer):
    """Mistral."""


class MoDQwen2DecoderLayer(MoDDecoderLayer, Qwen2DecoderLayer):
    """Qwen2."""


class MoDDecoder:
    """Mixed in before a transformers decoder: some of its layers are Mixture-of-Depths layers.

    Attributes:
        mod_layer_class: Class of those layers.
    """

    mod_layer_class: type[MoDDecoderLayer]

    @property
    def retention_ratios(self) -> list[float | None]:
        """What the layers keep now, one entry a layer, None for a dense one; a warm-up changes it."""
        return [getattr(layer, "retention_ratio", None) for layer in self.layers]  # type: ignore[attr-defined]

    @classmethod
    def from_dense(cls, dense: PreTrainedModel, mod: MoDConfig) -> Any:
        """Take over a dense decoder's modules and give some of its layers a router.

        Args:
            dense: E.g. a `LlamaModel`; its parameters are used, not copied.
            mod: Which layers, and how.

        Returns:
            The p-MoD decoder.

        Raises:
            ValueError: If ``mod`` lists another number of layers, or the decoder uses sliding windows.
        """
        config = dense.config
        if len(mod.retention_ratios) != config.num_hidden_layers:
            raise ValueError(
                f"{len(mod.retention_ratios)} retention ratios for {config.num_hidden_layers} decoder layers"
            )
        if "sliding_attention" in (getattr(config, "layer_types", None) or ()) or (
            getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        ):
            raise ValueError(
                "a decoder with sliding-window attention is not supported: its window counts tokens"
            )
        decoder: Any = take_over(dense, lambda: cls(config))  # type: ignore[call-arg]
        layers = list(decoder.layers)
        for index in mod.mod_layers:
            layers[index] = decoder._mod_layer(layers[index], index, mod)
        decoder.layers = nn.ModuleList(layers)
        return decoder

    def _mod_layer(self, dense_layer: nn.Module, index: int, mod: MoDConfig) -> nn.Module:
        config = self.config  # type: ignore[attr-defined]
        layer: Any = take_over(dense_layer, lambda: self.mod_layer_class(config, index))  # type: ignore[call-arg]
        ratio = mod.retention_ratios[index]
        assert ratio is not None
        layer.add_router(config.hidden_size, mod, ratio)
        return layer

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Router):
            for parameter in module.parameters():
                init.zeros_(parameter)
        else:
            super()._init_weights(module)  # type: ignore[misc]


class PmodLlamaModel(MoDDecoder, LlamaModel):
    """Llama and Vicuna."""

    mod_layer_class = MoDLlamaDecoderLayer
    _no_split_modules = ("LlamaDecoderLayer", "MoDLlamaDecoderLayer")


class PmodMistralModel(MoDDecoder, MistralModel):
    """Mistral."""

    mod_layer_class = MoDMistralDecoderLayer
    _no_split_modules = ("MistralDecoderLayer", "MoDMistralDecoderLayer")


class PmodQwen2Model(MoDDecoder, Qwen2Model):
    """Qwen2."""

    mod_layer_class = MoDQwen2DecoderLayer
    _no_split_modules = ("Qwen2DecoderLayer", "MoDQwen2DecoderLayer")


DECODERS: dict[str, type[MoDDecoder]] = {
    "llama": PmodLlamaModel,
    "mistral": PmodMistralModel,
    "qwen2": PmodQwen2Model,
}


def to_mod(dense: PreTrainedModel, mod: MoDConfig) -> Any:
    """The p-MoD counterpart of a dense decoder.

    Raises:
        ValueError: If the decoder's architecture is not supported.
    """
    kind = dense.config.model_type
    if kind not in DECODERS:
        raise ValueError(f"language model {kind!r} is not supported; supported: {', '.join(DECODERS)}")
    return DECODERS[kind].from_dense(dense, mod)
