"""The two halves of a LLaVA in a form that can be counted on the meta device, and what their counts mean.

A whole LLaVA cannot run on meta (the placeholder check reads a value, ``unpad_image`` an image size), but its vision
tower and projector can, and so can its language model with LM head given embeddings. Between the two halves
nothing is multiplied.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

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


class VisionPath(nn.Module):
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


class DecoderPath(nn.Module):
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


def pixel_input(model: Any, work: Workload) -> Tensor:
    """Pixels of all crops of the batch, [crops, channels, height, width]."""
    assert work.image is not None
    vision = model.config.vision_config
    shape = (work.batch * work.image.crops, vision.num_channels, vision.image_size, vision.image_size)
    return torch.empty(shape, dtype=model.dtype, device=model.device)


def decoder_input(model: Any, work: Workload, tokens: int, keys: int) -> tuple[Tensor, Tensor]:
    """Embeddings [batch, tokens, hidden] and a 4-D mask, which keeps transformers from building one."""
    width = model.config.text_config.hidden_size
    embeddings = torch.empty(work.batch, tokens, width, dtype=model.dtype, device=model.device)
    mask = torch.zeros(work.batch, 1, tokens, keys, dtype=model.dtype, device=model.device)
    return embeddings, mask


def routing_plan(model: Any, work: Workload) -> RoutingPlan | None:
    """The plan of a prefill whose token counts the host knows; None for a dense model."""
    mod = getattr(model.model, "mod", None)
    routed = work.routed_tokens(mod.target_tokens) if mod else 0
    if not routed:
        return None
    mask = torch.empty(work.batch, work.prompt_tokens, dtype=torch.bool, device=model.device)
    counts, lengths = [routed] * work.batch, [work.prompt_tokens] * work.batch
    return RoutingPlan.from_counts(mask, None, counts, lengths, model.model.language_model.retention_ratios)


def empty_cache(model: Any) -> Any:
    """The KV cache that the model's own prefill starts with."""
    config = model.config.text_config
    cache = DynamicCache(config=config)
    if mod := getattr(model.model, "mod", None):
        adopt_cache(cache, mod.mod_layers, config.num_hidden_layers)
    return cache


def cache_lengths(cache: Any) -> list[int]:
    """Tokens that each layer of a KV cache holds, for the sample that has most."""
    return [layer.keys.shape[-2] for layer in cache.layers]


def cache_bytes(cache: Any) -> list[int]:
    """Bytes of keys and values of each layer of a KV cache, from the tensors themselves."""
    return [
        sum(tensor.numel() * tensor.element_size() for tensor in (layer.keys, layer.values))
        for layer in cache.layers
    ]


def assemble(decoder: Counts, vision: Counts, tokens: list[int]) -> PhaseCount:
    """Sort counts by module into parts and layers.

    Args:
        decoder: Counts of a `DecoderPath`.
        vision: Counts of a `VisionPath`; empty if no image was encoded.
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
