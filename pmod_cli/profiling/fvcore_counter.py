"""Counting by fvcore: the real model's graph is traced on the meta device, and each operator of it counted.

A whole LLaVA cannot run on meta (the placeholder check reads a value, ``unpad_image`` an image size), but its vision
tower and projector can, and so can its language model with LM head given embeddings. Between the two halves
nothing is multiplied.

fvcore counts one per multiply-add, knows nothing of fused attention (hence our handle), and leaves out what the
output does not depend on (the vision tower's layers after the selected one).
"""

from __future__ import annotations

import dataclasses
import re
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

from pmod_cli.modeling.cache import adopt_cache
from pmod_cli.modeling.compat import CACHE_ARGUMENT
from pmod_cli.modeling.plan import RoutingPlan
from pmod_cli.modeling.twin import meta_model
from pmod_cli.output.errors import PmodError
from pmod_cli.profiling.closed_form import LayerCount, PhaseCount
from pmod_cli.profiling.prompt import Workload
from pmod_cli.profiling.subject import Variant

Counts = Mapping[str, Mapping[str, int]]
"""MACs by module name and operator."""


def distinct_layers(variant: Variant) -> tuple[Variant, list[int]]:
    """A model with one decoder layer of each kind: layers of one ratio and attention do the same work.

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
    raw_text = variant.raw.get("text_config") or (text.to_dict() if "hidden_size" in variant.raw else {})
    raw = variant.raw | {"text_config": raw_text | changes}
    mod = variant.mod and dataclasses.replace(variant.mod, retention_ratios=[ratio for ratio, _ in first])
    return dataclasses.replace(variant, raw=raw, mod=mod), [first.index(kind) for kind in kinds]


def trace(variant: Variant, work: Workload) -> tuple[PhaseCount, PhaseCount]:
    """MACs of a prefill and of the first decode step; of layers that do the same work one is traced."""
    short, places = distinct_layers(variant)
    try:
        counted = count(meta_model(short.config, work.dtype), work)
    except RuntimeError as error:
        if "overflow" in str(error):  # a tensor of more than 2^63 bytes
            raise PmodError("the prompt is too large for fvcore's count", "--counter formula") from error
        raise
    prefill, step = (
        dataclasses.replace(found, layers=tuple(found.layers[place] for place in places)) for found in counted
    )
    return prefill, step


def count(model: Any, work: Workload) -> tuple[PhaseCount, PhaseCount]:
    """MACs of a prefill and of the first decode step of a dense or p-MoD model on the meta device."""
    text, mod = model.config.text_config, getattr(model.model, "mod", None)
    shape = work.batch, work.prompt_tokens
    cache = DynamicCache(config=text)
    plan = None
    if mod:
        adopt_cache(cache, mod.mod_layers, text.num_hidden_layers)
        if routed := work.routed_tokens(mod.target_tokens):
            mask = torch.empty(shape, dtype=torch.bool, device=model.device)
            counts, lengths = [routed] * work.batch, [work.prompt_tokens] * work.batch
            ratios = model.get_decoder().retention_ratios
            plan = RoutingPlan.from_counts(mask, None, counts, lengths, ratios)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=model.dtype, device=model.device)

    def decode(tokens: int, keys: int, plan: RoutingPlan | None) -> Counts:
        # A 4-D mask keeps transformers from building one.
        inputs = zeros(work.batch, tokens, text.hidden_size), zeros(work.batch, 1, tokens, keys)
        return _trace(_DecoderPath(model, work.all_logits, cache, plan), *inputs)

    with _autocast_off():
        with _NoReinterpretation():
            prefill = decode(work.prompt_tokens, work.prompt_tokens, plan)
        lengths = [layer.keys.shape[-2] for layer in cache.layers]
        step = decode(1, work.prompt_tokens + 1, None)
        vision: Counts = {}
        if work.image:
            path = (_MergedPath if hasattr(model.model, "visual") else _VisionPath)(model, work)
            vision = _with_copies(_trace(path, zeros(*path.shape)), path.copies)
    return _assemble(prefill, vision, lengths), _assemble(step, {}, [1] * len(lengths))


class _VisionPath(nn.Module):
    """Pixels to projected features: the tower, the selected layers, the projector."""

    def __init__(self, model: Any, work: Workload) -> None:
        super().__init__()
        inner, config = model.model, model.config
        assert work.image is not None
        self.tower = inner.vision_tower if hasattr(inner, "vision_tower") else inner.vision_model
        self.projector = inner.multi_modal_projector if hasattr(inner, "vision_tower") else inner.connector
        embeddings = self.tower.embeddings
        if hasattr(embeddings, "patch_embeddings"):  # InternVL's
            embeddings.patch_embeddings.projection = _UnfoldedPatches(embeddings.patch_embeddings.projection)
            embeddings.interpolate_pos_encoding = lambda *_: embeddings.position_embeddings
        elif hasattr(inner, "connector"):
            self.tower.embeddings = _UnfoldedPatches(embeddings.patch_embedding, whole=True)
        else:
            embeddings.patch_embedding = _UnfoldedPatches(embeddings.patch_embedding)
        selected = getattr(config, "vision_feature_layer", -1)
        self.layers = [selected] if isinstance(selected, int) else list(selected)
        self.drop_cls = getattr(config, "vision_feature_select_strategy", "") == "default"
        self.shuffle = getattr(inner, "pixel_shuffle", None)
        self.ratio = getattr(config, "downsample_ratio", 1)
        # LLaVA takes the list of all layers' outputs, others what the tower gives.
        self.last = self.layers == [-1] and (self.shuffle is not None or hasattr(inner, "connector"))
        self.copies: dict[str, int] = {}
        crops, (rows, columns) = work.batch * work.image.crops, work.image.patches
        vision = config.vision_config
        patch = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
        self.shape = (crops, vision.num_channels, rows * patch, columns * patch)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Features [crops, tokens, hidden] of pixels [crops, channels, height, width]."""
        if self.last:
            features = self.tower(pixel_values).last_hidden_state[:, int(self.drop_cls) :]
        else:
            states = self.tower(pixel_values, output_hidden_states=True).hidden_states
            features = torch.cat([states[layer][:, int(self.drop_cls) :] for layer in self.layers], dim=-1)
        if self.shuffle is not None:
            side = int(features.shape[1] ** 0.5)
            features = self.shuffle(features.reshape(len(features), side, side, -1), scale_factor=self.ratio)
            features = features.reshape(len(features), -1, features.shape[-1])
        return self.projector(features)


class _MergedPath(nn.Module):
    """Patches to features where the tower takes pictures in their own shapes and merges patches itself."""

    def __init__(self, model: Any, work: Workload) -> None:
        super().__init__()
        tower, vision = model.model.visual, model.config.vision_config
        assert work.image is not None
        self.tower = tower
        # Shapes of grids are read, so they are on the CPU; what is made of them, and no multiplications, is not.
        self.grids = torch.tensor([[1, *work.image.patches]] * work.batch)
        patches = int(self.grids.prod(-1).sum())
        convolution = tower.patch_embed.proj
        self.shape = (patches, convolution.weight[0].numel())
        tower.patch_embed = _FlatPatches(convolution)
        tower.rotary_pos_emb = _NoRotation(patches, convolution.out_channels // vision.num_heads)
        places = torch.zeros(patches, 4, dtype=torch.long, device=model.device)
        self.positions = (
            {"interp_indices": places, "interp_weights": places} if hasattr(tower, "pos_embed") else {}
        )
        self.copies: dict[str, int] = {}
        full = [index % vision.depth for index in getattr(vision, "fullatt_block_indexes", ())]
        if full and len(full) < vision.depth:
            # A block with windows has an attention for each of them: one such block is traced, and one without.
            within = next(index for index in range(vision.depth) if index not in full)
            tower.blocks = nn.ModuleList([tower.blocks[within], tower.blocks[full[0]]])
            tower.fullatt_block_indexes = [1]
            self.copies = {"tower.blocks.0": vision.depth - len(full), "tower.blocks.1": len(full)}

    def forward(self, patches: Tensor) -> tuple[Tensor, ...]:
        """Features [tokens, hidden] of flat patches, those of DeepStack too."""
        output = self.tower(patches, self.grids, **self.positions)
        return output.pooler_output, *getattr(output, "deepstack_features", ())


class _NoRotation(nn.Module):
    """Stands for a rotary embedding, which multiplies element by element: tables of zeros."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.shape = tokens, width

    def forward(self, states: Tensor, _: Any) -> tuple[Tensor, Tensor]:
        """Tables [tokens, width] for cosine and sine."""
        return states.new_zeros(self.shape), states.new_zeros(self.shape)


class _FlatPatches(nn.Module):
    """A convolution over whole patches as the matrix that it is."""

    def __init__(self, convolution: Any) -> None:
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches, self.weight.flatten(1), self.bias)


class _DecoderPath(nn.Module):
    """Embeddings to logits: the language model, which fills or continues the KV cache, and the LM head."""

    def __init__(self, model: Any, all_logits: bool, cache: Any, plan: RoutingPlan | None) -> None:
        super().__init__()
        self.language_model, self.lm_head = model.get_decoder(), model.lm_head
        self.first_logit = 0 if all_logits else -1
        self.options = {CACHE_ARGUMENT: cache, "use_cache": True}
        if plan is not None:
            self.options["routing_plan"] = plan

    def forward(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Logits [batch, positions, vocabulary] of embeddings [batch, tokens, hidden] and a 4-D mask."""
        output = self.language_model(inputs_embeds=embeddings, attention_mask=mask, **self.options)
        return self.lm_head(output.last_hidden_state[:, self.first_logit :])


def _assemble(decoder: Counts, vision: Counts, tokens: list[int]) -> PhaseCount:
    """Sort counts by module into parts and layers, of which each processed so many ``tokens``."""

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

    # A merger stands inside its tower.
    mergers = {
        name: counts for name, counts in vision.items() if re.fullmatch(r"tower\.(\w*merger\w*)", name)
    }
    merged = sum(sum(counts.values()) for counts in mergers.values())
    norms = vision.get("tower", {}).get("layer_norm", 0) - sum(
        c.get("layer_norm", 0) for c in mergers.values()
    )
    return PhaseCount(
        layers=tuple(layer(index, processed) for index, processed in enumerate(tokens)),
        lm_head=total(decoder, "lm_head"),
        vision_tower=total(vision, "tower") - merged - norms,
        vision_norms=norms,
        projector=total(vision, "projector") + merged,
    )


def _with_copies(vision: Counts, copies: Mapping[str, int]) -> Counts:
    """Counts in which blocks of the tower count so many times."""
    tower = dict(vision.get("tower", {}))
    for name, number in copies.items():
        for operator, macs in vision[name].items():
            tower[operator] += (number - 1) * macs
    return {**vision, "tower": tower}


def _trace(module: nn.Module, *inputs: Tensor) -> Counts:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fvcore's use of torch.jit
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
    torch.is_autocast_enabled = lambda device_type=None: False
    try:
        yield
    finally:
        torch.is_autocast_enabled = ask


class _NoReinterpretation(TorchFunctionMode):
    """Casts where a model reinterprets bits (``view(dtype)``, which torch.jit cannot trace): shapes stay the same."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.view and len(args) == 2 and isinstance(args[1], torch.dtype):
            func = Tensor.to
        return func(*args, **(kwargs or {}))


class _UnfoldedPatches(nn.Module):
    """A patch convolution as unfold and linear, the same multiply-adds: on meta a convolution cannot be traced.

    With ``whole`` it stands for all of a tower's embeddings: what is left out multiplies nothing.
    """

    def __init__(self, convolution: nn.Conv2d, whole: bool = False) -> None:
        super().__init__()
        self.convolution, self.weight, self.whole = convolution, convolution.weight, whole

    def forward(self, pixels: Tensor | None = None, pixel_values: Tensor | None = None, **_: Any) -> Tensor:
        pixels = pixel_values if pixels is None else pixels
        assert pixels is not None
        patches = F.unfold(pixels, self.convolution.kernel_size, stride=self.convolution.stride)
        features = F.linear(patches.transpose(1, 2), self.weight.flatten(1), self.convolution.bias)
        return features if self.whole else features.transpose(1, 2)[..., None]
