"""Multiply-adds, KV cache, parameters and memory traffic by formula; ``docs/profile.md`` has the decoder's.

One MAC is one multiply-add, which is two FLOPs. Attention is counted over all query-key pairs: kernels may skip
masked ones, but fvcore does not assume so. Element-wise operations are not counted, except the
tower's LayerNorms, at fvcore's 5 per value.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pmod_cli.modeling.schedule import kept_tokens
from pmod_cli.modeling.settings import MoDConfig
from pmod_cli.profiling.geometry import Geometry
from pmod_cli.profiling.prompt import Workload

LAYER_PARTS = ("attention_projections", "attention_scores", "mlp", "router")
PARTS = ("vision_tower", "vision_norms", "projector", *LAYER_PARTS, "lm_head")


@dataclass(frozen=True)
class Convention:
    """What a count includes.

    Attributes:
        name: Its name in output.
        scores: Score and value products of attention.
        unused_layers: Tower layers after the selected feature layer, which transformers runs all the same.
        one_crop: Only one crop goes through the vision tower, however many the image has.
        original_vocab: The LM head without the rows added for the image token.
    """

    name: str
    scores: bool = True
    unused_layers: bool = False
    one_crop: bool = False
    original_vocab: bool = False


FULL = Convention("full")
PAPER = Convention("paper", scores=False, unused_layers=True, one_crop=True, original_vocab=True)
CONVENTIONS = {convention.name: convention for convention in (FULL, PAPER)}


@dataclass(frozen=True)
class LayerCount:
    """MACs of one decoder layer, over the whole batch.

    Attributes:
        tokens: Tokens per sample that the layer processes.
        attention_projections: Query, key, value and output projections.
        attention_scores: Score and value products.
        mlp: Gate, up and down projections.
        router: Router of an MoD layer.
    """

    tokens: int
    attention_projections: int
    attention_scores: int
    mlp: int
    router: int = 0

    @property
    def macs(self) -> int:
        """All of the layer's MACs."""
        return self.attention_projections + self.attention_scores + self.mlp + self.router


@dataclass(frozen=True)
class PhaseCount:
    """MACs of one prefill or of one decode step, over the whole batch."""

    layers: tuple[LayerCount, ...]
    lm_head: int
    vision_tower: int = 0
    vision_norms: int = 0
    projector: int = 0
    parts: dict[str, int] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        totals = {part: sum(getattr(layer, part) for layer in self.layers) for part in LAYER_PARTS}
        totals |= {part: getattr(self, part) for part in PARTS if part not in LAYER_PARTS}
        object.__setattr__(self, "parts", {part: totals[part] for part in PARTS})

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
    geometry: Geometry, mod: MoDConfig | None, work: Workload, convention: Convention = FULL
) -> PhaseCount:
    """Count the prompt's forward pass, image included.

    Args:
        geometry: The dense model.
        mod: What makes it p-MoD; None to count it dense.
        work: Image, text and batch.
        convention: What to include.
    """
    decoder = geometry.decoder
    crops = work.batch * (0 if work.image is None else 1 if convention.one_crop else work.image.crops)
    routed = 0 if mod is None else work.routed_tokens(mod.target_tokens)
    ratios = mod.retention_ratios if mod else [None] * decoder.layers
    layers = tuple(
        _decoder_layer(
            geometry,
            tokens,
            keys=tokens,
            batch=work.batch,
            # The router sees the whole sequence; the logits of tokens that are not routed go unused.
            routed=0 if ratio is None or not routed else work.prompt_tokens,
            scores=convention.scores,
        )
        for tokens, ratio in zip(layer_tokens(geometry, mod, work), ratios, strict=True)
    )
    positions = work.batch * (work.prompt_tokens if work.all_logits else 1)
    return PhaseCount(
        layers=layers,
        lm_head=positions * _lm_head(geometry, convention),
        vision_tower=crops * _tower(geometry, convention),
        vision_norms=crops * _tower_norms(geometry, convention),
        projector=crops * _projector(geometry),
    )


def decode_step(
    geometry: Geometry, mod: MoDConfig | None, work: Workload, convention: Convention = FULL, step: int = 0
) -> PhaseCount:
    """Count one new token per sample; every layer processes it, whatever its ratio.

    Args:
        geometry: The dense model.
        mod: What makes it p-MoD; None to count it dense.
        work: Image, text and batch.
        convention: What to include.
        step: Tokens decoded before this one.
    """
    layers = tuple(
        _decoder_layer(geometry, 1, keys=cached + step + 1, batch=work.batch, scores=convention.scores)
        for cached in layer_tokens(geometry, mod, work)
    )
    return PhaseCount(layers=layers, lm_head=work.batch * _lm_head(geometry, convention))


def generation_macs(
    geometry: Geometry, mod: MoDConfig | None, work: Workload, convention: Convention = FULL
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
    token = 2 * decoder.kv_heads * decoder.head_dim * work.bytes_per_value
    return [work.batch * (cached + decoded) * token for cached in layer_tokens(geometry, mod, work)]


def parameters(geometry: Geometry, mod: MoDConfig | None) -> dict[str, int]:
    """Number of parameters by part; the unused tower layers exist and so are counted."""
    decoder, tower = geometry.decoder, geometry.tower
    width, attention = decoder.hidden, decoder.heads * decoder.head_dim
    kv = decoder.kv_heads * decoder.head_dim
    biases = decoder.qkv_bias * (attention + 2 * kv) + decoder.output_bias * width
    mlp = 3 * width * decoder.intermediate + decoder.mlp_bias * (2 * decoder.intermediate + width)
    vision = tower.hidden
    tower_layer = 4 * (vision**2 + vision) + (2 * vision + 1) * tower.intermediate + vision + 4 * vision
    # CLIP's class embedding, or the bias of SigLIP's patch convolution: a vector either way.
    embedding = vision * (1 + tower.channels * tower.patch**2 + tower.tokens)
    outer_norms = 2 * vision * (1 + tower.has_cls)
    newline = width if geometry.pinpoints else 0
    return {
        "vision_tower": embedding + outer_norms + tower.layers * tower_layer,
        "projector": _projector_weights(geometry) + 2 * width * geometry.projector_bias + newline,
        "embeddings": decoder.vocab * width,
        "attention_projections": decoder.layers * (2 * width * (attention + kv) + biases),
        "mlp": decoder.layers * mlp,
        "norms": (2 * decoder.layers + 1) * width,
        "router": len(mod.mod_layers) * (width + mod.router_bias) if mod else 0,
        "lm_head": 0 if decoder.tied else decoder.vocab * width,
    }


def least_traffic(geometry: Geometry, mod: MoDConfig | None, work: Workload) -> dict[str, int]:
    """Bytes that prefill and the first decode step must move, however well they are written.

    Prefill reads every weight once (of the embedding table only the prompt's rows) and writes the KV cache; a decode
    step reads the decoder's weights and the KV cache.
    """
    counts = parameters(geometry, mod)
    size = work.bytes_per_value
    vocabulary = geometry.decoder.vocab * geometry.decoder.hidden
    layers = counts["attention_projections"] + counts["mlp"] + counts["norms"] + vocabulary
    vision = counts["vision_tower"] + counts["projector"] if work.image else 0
    rows = work.batch * work.text_tokens * geometry.decoder.hidden
    cache = sum(kv_bytes(geometry, mod, work))
    return {
        "prefill": (layers + vision + counts["router"] + rows) * size + cache,
        "decode_step": (layers + work.batch * geometry.decoder.hidden) * size + cache,
    }


def _decoder_layer(
    geometry: Geometry, tokens: int, *, keys: int, batch: int, routed: int = 0, scores: bool = True
) -> LayerCount:
    decoder = geometry.decoder
    attention, kv = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim
    return LayerCount(
        tokens=tokens,
        attention_projections=batch * tokens * 2 * decoder.hidden * (attention + kv),
        attention_scores=batch * tokens * keys * 2 * attention if scores else 0,
        mlp=batch * tokens * 3 * decoder.hidden * decoder.intermediate,
        router=batch * routed * decoder.hidden,
    )


def _lm_head(geometry: Geometry, convention: Convention) -> int:
    vocab = geometry.original_vocab if convention.original_vocab else geometry.decoder.vocab
    return geometry.decoder.hidden * vocab


def _tower_layers(geometry: Geometry, convention: Convention) -> int:
    return geometry.tower.layers if convention.unused_layers else geometry.tower.used_layers


def _tower(geometry: Geometry, convention: Convention) -> int:
    tower = geometry.tower
    patches = tower.grid**2 * tower.channels * tower.patch**2 * tower.hidden
    weights = 4 * tower.hidden**2 + 2 * tower.hidden * tower.intermediate
    scores = 2 * tower.tokens * tower.hidden if convention.scores else 0
    return patches + _tower_layers(geometry, convention) * tower.tokens * (weights + scores)


def _tower_norms(geometry: Geometry, convention: Convention) -> int:
    tower = geometry.tower
    return 5 * (tower.has_cls + 2 * _tower_layers(geometry, convention)) * tower.tokens * tower.hidden


def _projector_weights(geometry: Geometry) -> int:
    width = geometry.decoder.hidden
    return width * (geometry.tower.features * geometry.tower.hidden + width)


def _projector(geometry: Geometry) -> int:
    return geometry.tower.selected * _projector_weights(geometry)
