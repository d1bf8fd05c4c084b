"""Training through the choice of tokens.

A layer's top-k has no gradient: without this a router learns from its weights alone, which say little about what to
keep. Here every token is computed. The forward pass uses the kept ones, with the results of the routed layer; in the
backward pass keeping token j counts as ``sigmoid((key_j - threshold) / width)`` (the straight-through estimator of
Bengio et al., arXiv 1308.3432). So a skipped token, too, tells its router how the loss would change if the layer kept
it: by what attention and MLP would give it, and by what others would read from it. It costs what a dense layer costs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from pmod_cli.modeling.compat import CACHE_ARGUMENT
from pmod_cli.modeling.plan import RoutingPlan
from pmod_cli.modeling.routing import Routing, Tables

PRESENCE = "pmod_presence"
"""Name of the attention implementation."""

_FAR = 1e9
_TINY = torch.finfo(torch.float32).tiny
_LEAST_WIDTH = 1e-3
"""The width where all logits are alike, as of new routers."""

_HIGHEST = 30.0
"""By how much, at most, an absent token's score may be above all present ones'; e to its power is a number in fp32."""


def learning_choice(
    layer: Any, hidden_states: Tensor, tables: Tables | None, plan: RoutingPlan, shared: dict[str, Any]
) -> Tensor:
    """What a Mixture-of-Depths layer does, with a gradient through the choice.

    Args:
        layer: The `MoDDecoderLayer`.
        hidden_states: Residual stream, [batch, tokens, hidden].
        tables: Rotary tables (cos, sin).
        plan: Of this forward pass, which continues no cache.
        shared: Further arguments of the attention.

    Returns:
        Residual stream, [batch, tokens, hidden].
    """
    index: int = layer.self_attn.layer_idx
    routed = Routing(layer, hidden_states, plan, index)
    if plan.record is not None:
        plan.record[index] = routed.record()
    present = presence(routed, plan, index)
    shared = {name: value for name, value in shared.items() if name != CACHE_ARGUMENT}
    with _implementation(layer.self_attn.config):
        attended, _ = layer.self_attn(
            hidden_states=layer.input_layernorm(hidden_states),
            attention_mask=None,
            position_embeddings=tables,
            token_presence=present,
            **shared,
        )
    residual = hidden_states + attended
    branch = layer.mlp(layer.post_attention_layernorm(residual))
    weights = routed.flat_weights.view(*present.shape, 1)
    processed = torch.addcmul(residual, branch.to(residual.dtype), weights)
    return torch.lerp(routed.passed_on, processed, present[..., None].to(processed.dtype))


def presence(routed: Routing, plan: RoutingPlan, index: int) -> Tensor:
    """1 for kept tokens and 0 for others, fp32 [batch, tokens], with a gradient to the logits of routed ones."""
    target, logits = plan.target_mask, routed.logits
    assert target is not None
    kept = routed.record().kept
    keys = logits if plan.coverage is None else logits + plan.coverage[index]
    fixed = keys.detach()
    lowest = fixed.masked_fill(~(target & kept), _FAR).amin(-1, keepdim=True)
    highest = fixed.masked_fill(~target | kept, -_FAR).amax(-1, keepdim=True)
    width = logits.detach()[target].std().clamp(min=_LEAST_WIDTH)
    share = torch.sigmoid((keys - (lowest + highest) / 2) / width)
    return kept.float() + torch.where(target, share - share.detach(), 0.0)


def presence_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    token_presence: Tensor,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention to present tokens.

    The gradient of an absent token's presence is what the output would change by if the token were there. (The mere
    derivative has no bound: an absent token may fit the query far better than all that are present.)

    Args:
        module: The attention module.
        query: [batch, heads, tokens, head_dim].
        key: [batch, kv_heads, tokens, head_dim].
        value: As ``key``.
        attention_mask: None; absent tokens are in ``token_presence``.
        dropout: Share of attention weights dropped.
        scaling: By default ``head_dim ** -0.5``.
        token_presence: [batch, tokens].
        **kwargs: Those of transformers' functions.

    Returns:
        [batch, tokens, heads, head_dim], and no attention weights.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(2, 3)).float() * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    tokens = query.shape[2]
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()
    seen = causal & (token_presence.detach() > 0)[:, None, None]
    top = scores.detach().masked_fill(~seen, -_FAR).amax(-1, keepdim=True)
    odds = (scores - top).clamp(max=_HIGHEST).exp() * causal
    with torch.no_grad():
        present = (odds * seen).sum(-1, keepdim=True)
        share = torch.where(seen, 1.0, present / (present + odds).clamp(min=_TINY))
    odds = odds * share * token_presence[:, None, None]
    total = odds.sum(-1, keepdim=True).clamp(min=_TINY)
    attention = nn.functional.dropout(odds / total, dropout, module.training)
    return (attention.to(value.dtype) @ value).transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def _implementation(config: Any) -> Iterator[None]:
    before = config._attn_implementation
    config._attn_implementation_internal = PRESENCE
    try:
        yield
    finally:
        config._attn_implementation_internal = before


AttentionInterface.register(PRESENCE, presence_attention)
