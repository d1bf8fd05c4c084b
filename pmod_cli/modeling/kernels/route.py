"""Route: from the residual to each token's logit, weight, ranking key and weighted residual, in one pass."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pmod_cli.modeling.kernels.launch import block_of, operator, start, warps_of
from pmod_cli.modeling.router import selection_keys
from pmod_cli.modeling.weight_norm import WEIGHT_NORMS

NORMS = ("tanh", "sigmoid", "none")
"""Weight norms that look at one token; softmax is over all of a sample's, and stays in PyTorch."""


def reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    real: Tensor | None,
    rank: Tensor,
    norm: int,
    offset: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `route`."""
    logits = F.linear(hidden.float(), weight.float(), None if bias is None else bias.float()).squeeze(-1)
    weights = torch.where(target, offset + scale * WEIGHT_NORMS[NORMS[norm]](logits, target), 1.0)
    keys = selection_keys(logits, target, real, rank)
    return logits, weights, keys, hidden * weights.to(hidden.dtype)[..., None]


@functools.cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    # A layer's rows of the ranks are aligned or not as the prompt's length will have it: no kernel for each.
    @triton.jit(do_not_specialize=["offset", "scale"], do_not_specialize_on_alignment=["rank"])
    def route_kernel(
        hidden,
        weight,
        bias,
        target,
        real,
        rank,
        logits,
        weights,
        keys,
        passed,
        offset,
        scale,
        WIDTH: tl.constexpr,
        NORM: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        HAS_REAL: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, BLOCK)
        inside = columns < WIDTH
        x = tl.load(hidden + row * WIDTH + columns, mask=inside, other=0.0)
        w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
        wide = x.to(tl.float32)
        logit = tl.sum(wide * w, axis=0)
        if HAS_BIAS:
            logit += tl.load(bias).to(tl.float32)
        if NORM == 0:  # tanh; without overflow for large logits
            small = tl.exp(-2.0 * tl.abs(logit))
            size = (1.0 - small) / (1.0 + small)
            value = tl.where(logit < 0, -size, size)
        elif NORM == 1:
            value = 1.0 / (1.0 + tl.exp(-logit))
        else:
            value = logit
        routed = tl.load(target + row) != 0
        scaled = tl.where(routed, offset + scale * value, 1.0)

        bits = (logit + 0.0).to(tl.int32, bitcast=True)
        ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        key = (ordered.to(tl.int64) << 32) | (0xFFFFFFFF - tl.load(rank + row))
        key = tl.where(routed, key, 0x7FFFFFFFFFFFFFFF)
        if HAS_REAL:
            key = tl.where(tl.load(real + row) != 0, key, -0x8000000000000000)

        tl.store(logits + row, logit)
        tl.store(weights + row, scaled)
        tl.store(keys + row, key)
        # Rounded to the model's dtype first, as the PyTorch path does.
        rounded = scaled.to(x.dtype).to(tl.float32)
        tl.store(passed + row * WIDTH + columns, (wide * rounded).to(x.dtype), mask=inside)

    return route_kernel


def _launch(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    real: Tensor | None,
    rank: Tensor,
    norm: int,
    offset: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, tokens, width = hidden.shape
    hidden, target, rank = hidden.contiguous(), target.contiguous(), rank.contiguous()
    logits = torch.empty(batch, tokens, dtype=torch.float32, device=hidden.device)
    weights, passed = torch.empty_like(logits), torch.empty_like(hidden)
    keys = torch.empty(batch, tokens, dtype=torch.int64, device=hidden.device)
    bias_or_any, real_or_any = weight if bias is None else bias, target if real is None else real.contiguous()
    block = block_of(width)
    start(
        _kernel(),
        batch * tokens,
        (hidden, weight, bias_or_any, target, real_or_any, rank, logits, weights, keys, passed),
        (float(offset), float(scale)),
        (width, norm, bias is not None, real is not None, block),
        warps_of(block),
    )
    return logits, weights, keys, passed


_operator = operator(
    "route(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? real, Tensor rank, int norm, "
    "float offset, float scale) -> (Tensor, Tensor, Tensor, Tensor)",
    reference,
    _launch,
)


def route(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    real: Tensor | None,
    rank: Tensor,
    *,
    norm: str,
    offset: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`Router`, `selection_keys` and the weighted residual at once.

    Args:
        hidden: Residual stream, [batch, tokens, hidden].
        weight: The router's, [1, hidden].
        bias: The router's, [1], or None.
        target: True for routed tokens, [batch, tokens].
        real: False for padding, [batch, tokens], or None.
        rank: What `spread_rank` gave for the layer, [batch, tokens].
        norm: One of `NORMS`.
        offset: The router's weight bias.
        scale: The router's weight scale.

    Returns:
        Logits and weights, fp32 [batch, tokens]; keys, int64 [batch, tokens]; ``hidden`` times the weights, which
        are rounded to its dtype, [batch, tokens, hidden].
    """
    result: tuple[Tensor, Tensor, Tensor, Tensor] = _operator(
        hidden, weight, bias, target, real, rank, NORMS.index(norm), offset, scale
    )
    return result
