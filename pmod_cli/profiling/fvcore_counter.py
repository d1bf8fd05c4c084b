"""Counting by fvcore: the real model's graph is traced on the meta device, and each operator of it counted.

A whole LLaVA cannot run on meta (the placeholder check reads a value, ``unpad_image`` an image size), but its vision
tower and projector can, and so can its language model with LM head given embeddings. Between the two halves
nothing is multiplied.

fvcore counts one per multiply-add, knows nothing of fused attention (hence our handle), and leaves out what the
output does not depend on (the vision tower's layers after the selected one).
"""

from __future__ import annotations

import dataclasses
import gc
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache

from pmod_cli.extras import require
from pmod_cli.modeling.cache import adopt_cache
from pmod_cli.modeling.compat import CACHE_ARGUMENT
from pmod_cli.modeling.plan import RoutingPlan
from pmod_cli.profiling.closed_form import LayerCount, PhaseCount
from pmod_cli.profiling.prompt import Workload
from pmod_cli.profiling.subject import Variant

Counts = Mapping[str, Mapping[str, int]]
"""MACs by module name and operator."""


def distinct_layers(variant: Variant) -> tuple[Variant, list[int]]:
    """A model with one decoder layer of each kind: layers of one ratio and attention do the same work.

    Args:
        variant: The whole model.

    Returns:
        The model with the first layer of each kind only, and for each layer of the whole model its index there.
    """
    text = variant.config.text_config
    types = getattr(text, "layer_types", None)
    ratios = variant.mod.retention_ratios if variant.mod else [None] * text.num_hidden_layers
    kinds = list(zip(ratios, types or [None] * len(ratios), strict=True))
    first = list(dict.fromkeys(kinds))
    changes: dict[str, Any] = {"num_hidden_layers": len(first)}
    if types:
        changes["layer_types"] = [kind for _, kind in first]
    raw = variant.raw | {"text_config": (variant.raw.get("text_config") or {}) | changes}
    mod = variant.mod and dataclasses.replace(variant.mod, retention_ratios=[ratio for ratio, _ in first])
    return dataclasses.replace(variant, raw=raw, mod=mod), [first.index(kind) for kind in kinds]


def repeat_layers(count: PhaseCount, indices: list[int]) -> PhaseCount:
    """The count of a whole model from that of its `distinct_layers`.

    Args:
        count: Of the model with one layer of each kind.
        indices: Where each layer of the whole model is among them.
    """
    return dataclasses.replace(count, layers=tuple(count.layers[index] for index in indices))


def count(model: Any, work: Workload) -> tuple[PhaseCount, PhaseCount]:
    """Trace a prefill and the first decode step.

    Args:
        model: Dense or p-MoD, on the meta device.
        work: Image, text and batch.

    Returns:
        MACs of prefill and of the decode step.

    Raises:
        MissingExtraError: If fvcore is not installed.
    """
    tokens = work.prompt_tokens
    cache = _empty_cache(model)
    with _autocast_off():
        with _NoReinterpretation():
            path = _DecoderPath(model, work, cache, _routing_plan(model, work))
            prefill = _trace(path, *_decoder_input(model, work, tokens, tokens))
        lengths = [layer.keys.shape[-2] for layer in cache.layers]
        step = _trace(_DecoderPath(model, work, cache), *_decoder_input(model, work, 1, tokens + 1))
        vision: Counts = {}
        if work.image:
            encoder = _VisionPath(model)
            with _traceable_patches(encoder.tower):
                vision = _trace(encoder, _pixels(model, work))
    return _assemble(prefill, vision, lengths), _assemble(step, {}, [1] * len(lengths))


class _VisionPath(nn.Module):
    """Pixels to projected features: the tower, the selected layers, the projector."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.tower, self.projector = model.model.vision_tower, model.model.multi_modal_projector
        selected = model.config.vision_feature_layer
        self.layers = [selected] if isinstance(selected, int) else list(selected)
        self.drop_cls = model.config.vision_feature_select_strategy == "default"

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Features [crops, tokens, hidden] of pixels [crops, channels, height, width]."""
        states = self.tower(pixel_values, output_hidden_states=True).hidden_states
        features = torch.cat([states[layer][:, int(self.drop_cls) :] for layer in self.layers], dim=-1)
        return self.projector(features)


class _DecoderPath(nn.Module):
    """Embeddings to logits: the language model and the LM head.

    Args:
        model: The whole model.
        work: Which positions need logits, and how many tokens are routed.
        cache: The KV cache to fill or continue.
        plan: The routing plan of a p-MoD prefill.
    """

    def __init__(self, model: Any, work: Workload, cache: Any, plan: RoutingPlan | None = None) -> None:
        super().__init__()
        self.language_model, self.lm_head = model.model.language_model, model.lm_head
        self.first_logit = 0 if work.all_logits else -1
        self.options: dict[str, Any] = {CACHE_ARGUMENT: cache, "use_cache": True}
        if plan is not None:
            self.options["routing_plan"] = plan

    def forward(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Logits [batch, positions, vocabulary] of embeddings [batch, tokens, hidden] and a 4-D mask."""
        output = self.language_model(inputs_embeds=embeddings, attention_mask=mask, **self.options)
        return self.lm_head(output.last_hidden_state[:, self.first_logit :])


def _pixels(model: Any, work: Workload) -> Tensor:
    """Pixels of all crops of the batch, [crops, channels, height, width]."""
    assert work.image is not None
    vision = model.config.vision_config
    shape = (work.batch * work.image.crops, vision.num_channels, vision.image_size, vision.image_size)
    return torch.empty(shape, dtype=model.dtype, device=model.device)


def _decoder_input(model: Any, work: Workload, tokens: int, keys: int) -> tuple[Tensor, Tensor]:
    """Embeddings [batch, tokens, hidden] and a 4-D mask, which keeps transformers from building one."""
    width = model.config.text_config.hidden_size
    embeddings = torch.empty(work.batch, tokens, width, dtype=model.dtype, device=model.device)
    mask = torch.zeros(work.batch, 1, tokens, keys, dtype=model.dtype, device=model.device)
    return embeddings, mask


def _routing_plan(model: Any, work: Workload) -> RoutingPlan | None:
    """The plan of a prefill whose token counts the host knows; None for a dense model."""
    mod = getattr(model.model, "mod", None)
    routed = work.routed_tokens(mod.target_tokens) if mod else 0
    if not routed:
        return None
    mask = torch.empty(work.batch, work.prompt_tokens, dtype=torch.bool, device=model.device)
    counts, lengths = [routed] * work.batch, [work.prompt_tokens] * work.batch
    return RoutingPlan.from_counts(mask, None, counts, lengths, model.model.language_model.retention_ratios)


def _empty_cache(model: Any) -> Any:
    """The KV cache that the model's own prefill starts with."""
    config = model.config.text_config
    cache = DynamicCache(config=config)
    if mod := getattr(model.model, "mod", None):
        adopt_cache(cache, mod.mod_layers, config.num_hidden_layers)
    return cache


def _assemble(decoder: Counts, vision: Counts, tokens: list[int]) -> PhaseCount:
    """Sort counts by module into parts and layers.

    Args:
        decoder: Counts of a `_DecoderPath`.
        vision: Counts of a `_VisionPath`; empty if no image was encoded.
        tokens: Tokens that each decoder layer processed.
    """

    def total(counts: Counts, module: str) -> int:
        return sum(counts.get(module, {}).values())

    def layer(index: int, processed: int) -> LayerCount:
        name = f"language_model.layers.{index}"
        projections = sum(total(decoder, f"{name}.self_attn.{which}_proj") for which in "qkvo")
        return LayerCount(
            tokens=processed,
            attention_projections=projections,
            attention_scores=total(decoder, f"{name}.self_attn") - projections,
            mlp=total(decoder, f"{name}.mlp"),
            router=total(decoder, f"{name}.router"),
        )

    norms = vision.get("tower", {}).get("layer_norm", 0)
    return PhaseCount(
        layers=tuple(layer(index, processed) for index, processed in enumerate(tokens)),
        lm_head=total(decoder, "lm_head"),
        vision_tower=total(vision, "tower") - norms,
        vision_norms=norms,
        projector=total(vision, "projector"),
    )


def _trace(module: nn.Module, *inputs: Tensor) -> Counts:
    with torch.no_grad(), warnings.catch_warnings(), _collector_paused():
        warnings.simplefilter("ignore")  # fvcore's use of torch.jit
        require("fvcore")
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(module, inputs)
        analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_macs)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        return analysis.by_module_and_operator()


def _attention_macs(inputs: list[Any], _outputs: list[Any]) -> int:
    """Score and value products: query [..., S, D] with key [..., S_k, D] and value [..., S_k, D_v]."""
    query, key, value = (argument.type().sizes() for argument in inputs[:3])
    return prod(query) * key[-2] + prod(query[:-1]) * key[-2] * value[-1]


@contextmanager
def _autocast_off() -> Iterator[None]:
    """Answers a model that asks whether autocast is on for the meta device: torch raises instead of saying no."""
    ask = torch.is_autocast_enabled

    def answer(device_type: str | None = None) -> bool:
        if device_type == "meta":
            return False
        return ask() if device_type is None else ask(device_type)

    torch.is_autocast_enabled = answer
    try:
        yield
    finally:
        torch.is_autocast_enabled = ask


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Spares a fifth of the time: a trace makes many objects, and none of them is garbage before its end."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class _NoReinterpretation(TorchFunctionMode):
    """Casts where a model reinterprets bits (``view(dtype)``, which torch.jit cannot trace): shapes stay the same."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.view and len(args) == 2 and isinstance(args[1], torch.dtype):
            func = Tensor.to
        return func(*args, **(kwargs or {}))


class _UnfoldedPatches(nn.Module):
    """A patch convolution as unfold and linear, the same multiply-adds: on meta a convolution cannot be traced."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.convolution, self.weight = convolution, convolution.weight

    def forward(self, pixels: Tensor) -> Tensor:
        patches = F.unfold(pixels, self.convolution.kernel_size, stride=self.convolution.stride)
        features = F.linear(patches.transpose(1, 2), self.weight.flatten(1), self.convolution.bias)
        return features.transpose(1, 2)[..., None]


@contextmanager
def _traceable_patches(tower: Any) -> Iterator[None]:
    embeddings = tower.embeddings
    convolution = embeddings.patch_embedding
    embeddings.patch_embedding = _UnfoldedPatches(convolution)
    try:
        yield
    finally:
        embeddings.patch_embedding = convolution
