"""Language models with Mixture-of-Depths layers: the transformers classes, subclassed.

`mod_decoder` makes the class for any decoder whose layers are pre-norm (``input_layernorm``, ``self_attn``,
``post_attention_layernorm``, ``mlp``). The routing plan of a forward pass is made here, at the language model's door:
what comes before it, a family's own forward, stays as transformers wrote it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, LlamaModel, MistralModel, PreTrainedModel, Qwen2Model
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from pmod_cli.modeling.cache import StaticKeptTokensLayer, adopt_cache
from pmod_cli.modeling.compat import CACHE_ARGUMENT
from pmod_cli.modeling.kernels.launch import available
from pmod_cli.modeling.layer import MoDDecoderLayer
from pmod_cli.modeling.masks import causal_mask
from pmod_cli.modeling.plan import RoutingRecord, plan_forward
from pmod_cli.modeling.router import GOLDEN_STEP, Router
from pmod_cli.modeling.settings import MoDConfig


def take_over(dense: nn.Module, build: Callable[[], Any]) -> Any:
    """A new module of a subclass that holds the dense module's own children, parameters and buffers.

    Args:
        dense: The module to take over; its tensors are shared, not copied.
        build: Makes the new module; called on the meta device, so that it costs nothing.
    """
    with torch.device("meta"):
        module = build()
    tensors = (dense.named_parameters(recurse=False), dense.named_buffers(recurse=False))
    for part in (dense.named_children(), *tensors):
        for name, value in part:
            setattr(module, name, value)
    return module


class MoDDecoder:
    """Mixed in before a transformers decoder: some of its layers are Mixture-of-Depths layers.

    Attributes:
        mod_layer_class: Class of those layers.
        mod: Which layers, and how.
        token_step: See `spread_rank`.
        kernels: ``auto``: fused kernels where there is a GPU with Triton; ``torch``: never; ``fused``: always.
    """

    mod_layer_class: type[MoDDecoderLayer]
    mod: MoDConfig
    token_step: int = GOLDEN_STEP
    kernels: str = "auto"

    @property
    def retention_ratios(self) -> list[float | None]:
        """What the layers keep now, one entry per layer, None for a dense one; a warm-up changes it."""
        return [getattr(layer, "retention_ratio", None) for layer in self.layers]  # type: ignore[attr-defined]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Plan the forward pass, then run it.

        In front of ``forward``, so that ``compile()``, which compiles all behind this, meets no wait for the device.
        A call without ``vision_mask`` is not planned: it has its ``routing_plan``, or runs dense.
        """
        if "vision_mask" in kwargs:
            kwargs = self._plan(**kwargs)
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def _plan(
        self,
        *,
        vision_mask: Tensor | None,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        routing_record: RoutingRecord | None = None,
        vision_gradient: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The dense forward's arguments, and ``routing_plan``; the cache is made or adopted.

        The first arguments are `plan_forward`'s; ``vision_gradient`` is a zero that the embeddings carry on.
        """
        config: Any = self.config  # type: ignore[attr-defined]
        if vision_gradient is not None:
            inputs_embeds = inputs_embeds + vision_gradient.to(inputs_embeds.dtype)
        batch, length = inputs_embeds.shape[:2]
        use_cache = config.use_cache if use_cache is None else use_cache
        checkpointing = self.training and self.gradient_checkpointing  # type: ignore[attr-defined]
        cache = kwargs.pop(CACHE_ARGUMENT, None)
        if use_cache and cache is None and not checkpointing:
            cache = DynamicCache(config=config)
        if cache is not None:
            adopt_cache(cache, self.mod.mod_layers, config.num_hidden_layers)
        fused = self.kernels == "fused" or (self.kernels == "auto" and inputs_embeds.is_cuda and available())
        plan, mask = plan_forward(
            (batch, length),
            vision_mask,
            attention_mask,
            position_ids,
            self.retention_ratios,
            self.mod.target_tokens,
            routing_record,
            fused,
            self.mod.layer_coverage,
            self.token_step,
        )
        if plan is not None and self.mod.choice == "random":
            plan.draw()
        dense = self._static_dense_layers(cache)
        if dense and dense[0].started:
            mask = dense[0].mask(config, inputs_embeds, None if plan is None else plan.real_mask)
        elif mask is not None:
            mask = causal_mask(config, inputs_embeds, mask.shape[1] - length, mask)
        if plan is not None and plan.real_mask is not None:
            for layer in dense:
                layer.announce(length, None, plan.real_mask)
        return {
            **kwargs,
            CACHE_ARGUMENT: cache,
            "inputs_embeds": inputs_embeds,
            "attention_mask": mask,
            "position_ids": position_ids,
            "use_cache": use_cache,
            "routing_plan": plan,
        }

    def _static_dense_layers(self, cache: Cache | None) -> list[StaticKeptTokensLayer]:
        """What a static cache has for dense layers, which are all alike; empty for other caches."""
        layers = (
            []
            if cache is None
            else [cache.layers[i] for i, r in enumerate(self.retention_ratios) if r is None]
        )
        return [layer for layer in layers if isinstance(layer, StaticKeptTokensLayer)]

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
        decoder.mod = mod
        layers = list(decoder.layers)
        for index in mod.mod_layers:
            layers[index] = decoder._mod_layer(layers[index], index)
        decoder.layers = nn.ModuleList(layers)
        return decoder

    def _mod_layer(self, dense_layer: nn.Module, index: int) -> nn.Module:
        config: Any = self.config  # type: ignore[attr-defined]
        layer: Any = take_over(dense_layer, lambda: self.mod_layer_class(config, index))  # type: ignore[call-arg]
        layer.add_router(config.hidden_size, self.mod, self.mod.retention_ratios[index])
        return layer

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Router):
            module.reset_parameters()
        else:
            super()._init_weights(module)  # type: ignore[misc]


def mod_decoder(text_model: type, layer: type, module: str) -> Any:
    """The p-MoD class of a transformers decoder, e.g. `PmodLlamaModel`, with layers `MoDLlamaDecoderLayer`.

    Args:
        text_model: The decoder, e.g. `LlamaModel`.
        layer: Its layers' class, pre-norm, with two residual branches that are added as they are.
        module: Name of the module in which the class will stand; pass ``__name__``.
    """
    shared = {"__module__": module}
    mod_layer = type(f"MoD{layer.__name__}", (MoDDecoderLayer, layer), {**shared, "__doc__": layer.__doc__})
    attributes = {
        "__doc__": f"`{text_model.__name__}` with Mixture-of-Depths layers.",
        "mod_layer_class": mod_layer,
        "_no_split_modules": (layer.__name__, mod_layer.__name__),
    }
    return type(f"Pmod{text_model.__name__}", (MoDDecoder, text_model), {**shared, **attributes})


_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}


@functools.cache
def _pre_norm(text_model: type, layer: type) -> Any:
    known = globals().get(f"Pmod{text_model.__name__}")
    if known is not None and issubclass(known, text_model):
        return known  # one class, or pickle would not know the other
    made = mod_decoder(text_model, layer, __name__)
    globals().update(
        {cls.__name__: cls for cls in (made, made.mod_layer_class)}
    )  # where pickle looks for them
    return made


def pre_norm_decoder(language_model: Any) -> Any:
    """The p-MoD class of a dense decoder that is not known here, by the looks of its layers.

    Raises:
        ValueError: If they are not pre-norm.
    """
    dense = unrouted(type(language_model))
    layers = {unrouted(type(layer)): layer for layer in language_model.layers}
    for cls, layer in layers.items():
        parts = {name for name, _ in layer.named_children()} - {"router"}
        if parts != _PARTS:
            odd = ", ".join(sorted(parts ^ _PARTS))
            raise ValueError(f"{cls.__name__} is no pre-norm layer of attention and MLP: it differs in {odd}")
    if len(layers) != 1:
        raise ValueError(
            f"the layers of {dense.__name__} are of several kinds: {', '.join(c.__name__ for c in layers)}"
        )
    return _pre_norm(dense, next(iter(layers)))


def unrouted(cls: type) -> type:
    """The transformers class that a class extends, or is."""
    return next(base for base in cls.__mro__ if not issubclass(base, (MoDDecoder, MoDDecoderLayer)))


PmodLlamaModel = mod_decoder(LlamaModel, LlamaDecoderLayer, __name__)
PmodMistralModel = mod_decoder(MistralModel, MistralDecoderLayer, __name__)
PmodQwen2Model = mod_decoder(Qwen2Model, Qwen2DecoderLayer, __name__)
MoDLlamaDecoderLayer = PmodLlamaModel.mod_layer_class
MoDMistralDecoderLayer = PmodMistralModel.mod_layer_class
MoDQwen2DecoderLayer = PmodQwen2Model.mod_layer_class
