"""Multiply-adds, KV cache, parameters and memory traffic by formula; ``docs/profile.md`` has the decoder's.

One MAC is one multiply-add, which is two FLOPs. Attention is counted over all query-key pairs: kernels may skip
masked ones, but fvcore does not assume so. Element-wise operations are not counted, except the
tower's LayerNorms, at fvcore's 5 per value.

The ``paper`` convention leaves out the score and value products of attention, counts the tower's layers after the
selected one, which transformers runs all the same, takes one crop however many the image has, and has the LM head
without the rows that were added for the image token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pmod_cli.modeling.schedule import kept_tokens
from pmod_cli.modeling.settings import MoDConfig
from pmod_cli.profiling.geometry import Geometry
from pmod_cli.profiling.prompt import DTYPE_BYTES, Workload

LAYER_PARTS = ("attention_projections", "attention_scores", "mlp", "router")
PARTS = ("vision_tower", "vision_norms", "projector", *LAYER_PARTS, "lm_head")
PAPER = "paper"


@dataclass(frozen=True)
class LayerCount:
    """MACs of one decoder layer by part, over the whole batch; ``tokens`` is how many per sample it processes."""

    tokens: int
    attention_projections: int
    attention_scores: int
    mlp: int
    router: int = 0

    @property
    def macs(self) -> int:
        """All of the layer's MACs."""
        return sum(getattr(self, part) for part in LAYER_PARTS)


@dataclass(frozen=True)
class PhaseCount:
    """MACs of one prefill or of one decode step, over the whole batch."""

    layers: tuple[LayerCount, ...]
    lm_head: int
    vision_tower: int = 0
    vision_norms: int = 0
    projector: int = 0

    @property
    def parts(self) -> dict[str, int]:
        """MACs by part, decoder layers summed up, in the order of `PARTS`."""
        layers = {part: sum(getattr(layer, part) for layer in self.layers) for part in LAYER_PARTS}
        return {part: layers[part] if part in layers else getattr(self, part) for part in PARTS}

    @property
    def macs(self) -> int:
        """All MACs."""
        return sum(self.parts.values())


def layer_tokens(geometry: Geometry, mod: MoDConfig | None, work: Workload) -> list[int]:
    """Tokens per sample that each decoder layer processes and caches at prefill."""
    if mod is None:
        return [work.prompt_tokens] * geometry.decoder.layers
    routed = work.routed_tokens(mod.target_tokens)
    return [
        work.prompt_tokens - (0 if ratio is None else routed - kept_tokens(routed, ratio))
        for ratio in mod.retention_ratios
    ]


def prefill(
    geometry: Geometry, mod: MoDConfig | None, work: Workload, convention: str = "full"
) -> PhaseCount:
    """Count the prompt's forward pass, image included; ``mod`` is None for a dense model."""
    paper, tower = convention == PAPER, geometry.tower
    routed = work.routed_tokens(mod.target_tokens) if mod else 0
    layers = _layers(geometry, work, layer_tokens(geometry, mod, work), paper=paper)
    if mod and routed:
        # The router sees the whole sequence; the logits of tokens that are not routed go unused.
        router = work.batch * work.prompt_tokens * geometry.decoder.hidden
        layers = tuple(
            layer if ratio is None else replace(layer, router=router)
            for layer, ratio in zip(layers, mod.retention_ratios, strict=True)
        )
    crops = work.batch * (0 if work.image is None else 1 if paper else work.image.crops)
    grid = work.image.patches if work.image else (0, 0)
    tokens, depth = tower.tokens(grid), tower.layers if paper else tower.used_layers
    attention = 0 if paper else 2 * tower.pairs(grid) * tower.hidden
    inside = grid[0] * grid[1] * tower.patch_weights + depth * tokens * tower.layer_weights + attention
    norms = tower.outer_norms + depth * tower.layer_norms
    return PhaseCount(
        layers=layers,
        lm_head=work.batch * (work.prompt_tokens if work.all_logits else 1) * _lm_head(geometry, paper),
        vision_tower=crops * inside,
        vision_norms=crops * 5 * norms * tokens * tower.hidden,
        projector=crops * tower.rows(grid) * (geometry.projector.weights + 5 * geometry.projector.normed),
    )


def decode_step(
    geometry: Geometry, mod: MoDConfig | None, work: Workload, convention: str = "full", step: int = 0
) -> PhaseCount:
    """Count one new token per sample, ``step`` tokens after the first; every layer processes it, whatever its ratio."""
    paper = convention == PAPER
    cached = layer_tokens(geometry, mod, work)
    layers = _layers(geometry, work, [1] * len(cached), [count + step + 1 for count in cached], paper)
    return PhaseCount(layers=layers, lm_head=work.batch * _lm_head(geometry, paper))


def generation_macs(
    geometry: Geometry, mod: MoDConfig | None, work: Workload, convention: str = "full"
) -> int:
    """MACs of prefill and all decode steps: the first new token comes from prefill, so there are N - 1 steps."""
    steps = work.new_tokens - 1
    total = prefill(geometry, mod, work, convention).macs
    if steps > 0:
        # A step's cost is linear in the tokens before it, so the sum is the mean of first and last times N - 1.
        first = decode_step(geometry, mod, work, convention).macs
        last = decode_step(geometry, mod, work, convention, step=steps - 1).macs
        total += (first + last) * steps // 2
    return total


def kv_bytes(geometry: Geometry, mod: MoDConfig | None, work: Workload, decoded: int = 0) -> list[int]:
    """Bytes of each layer's KV cache, after the prompt and ``decoded`` more tokens."""
    decoder = geometry.decoder
    token = 2 * decoder.kv_heads * decoder.head_dim * DTYPE_BYTES[work.dtype]
    return [work.batch * (cached + decoded) * token for cached in layer_tokens(geometry, mod, work)]


def kv_cache_dict(prefill: list[int], final: list[int]) -> dict[str, Any]:
    """For JSON: bytes of KV cache by layer, and their sums."""
    return {
        "prefill_bytes": sum(prefill),
        "final_bytes": sum(final),
        "prefill_layers": prefill,
        "final_layers": final,
    }


def parameters(geometry: Geometry, mod: MoDConfig | None) -> dict[str, int]:
    """Number of parameters by part; the unused tower layers exist and so are counted."""
    decoder, tower = geometry.decoder, geometry.tower
    width, attention = decoder.hidden, decoder.heads * decoder.head_dim
    kv = decoder.kv_heads * decoder.head_dim
    biases = decoder.qkv_bias * (attention + 2 * kv) + decoder.output_bias * width
    mlp = 3 * width * decoder.intermediate + decoder.mlp_bias * (2 * decoder.intermediate + width)
    return {
        "vision_tower": tower.outer_parameters + tower.layers * tower.layer_parameters,
        "projector": geometry.projector.parameters,
        "embeddings": decoder.vocab * width,
        "attention_projections": decoder.layers * (2 * width * (attention + kv) + biases),
        "mlp": decoder.layers * mlp,
        "norms": (2 * decoder.layers + 1) * width
        + 2 * decoder.layers * decoder.head_dim * decoder.head_norms,
        "router": len(mod.mod_layers) * (width + mod.router_bias) if mod else 0,
        "lm_head": 0 if decoder.tied else decoder.vocab * width,
    }


def least_traffic(geometry: Geometry, mod: MoDConfig | None, work: Workload) -> dict[str, int]:
    """Bytes that prefill and the first decode step must move, however well they are written.

    Prefill reads every weight once (of the embedding table only the prompt's rows) and writes the KV cache; a decode
    step reads the decoder's weights and the KV cache.
    """
    counts = parameters(geometry, mod)
    size = DTYPE_BYTES[work.dtype]
    vocabulary = geometry.decoder.vocab * geometry.decoder.hidden
    layers = counts["attention_projections"] + counts["mlp"] + counts["norms"] + vocabulary
    vision = counts["vision_tower"] + counts["projector"] if work.image else 0
    rows = work.batch * work.text_tokens * geometry.decoder.hidden
    cache = sum(kv_bytes(geometry, mod, work))
    return {
        "prefill": (layers + vision + counts["router"] + rows) * size + cache,
        "decode_step": (layers + work.batch * geometry.decoder.hidden) * size + cache,
    }


def _layers(
    geometry: Geometry,
    work: Workload,
    tokens: Sequence[int],
    keys: Sequence[int] | None = None,
    paper: bool = False,
) -> tuple[LayerCount, ...]:
    """Each layer's MACs without router, from its tokens and keys (the same if none are given) per sample."""
    decoder, batch = geometry.decoder, work.batch
    attention, kv = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim
    return tuple(
        LayerCount(
            tokens=queries,
            attention_projections=batch * queries * 2 * decoder.hidden * (attention + kv),
            attention_scores=0 if paper else batch * queries * seen * 2 * attention,
            mlp=batch * queries * 3 * decoder.hidden * decoder.intermediate,
        )
        for queries, seen in zip(tokens, keys or tokens, strict=True)
    )


def _lm_head(geometry: Geometry, paper: bool) -> int:
    return geometry.decoder.hidden * (geometry.original_vocab if paper else geometry.decoder.vocab)
