"""Gather: rows of the kept tokens, the same normalised (RMSNorm), and their rows of the rotary tables."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from pmod_cli.modeling.kernels.launch import block_of, operator, start, warps_of


def rms_norm(rows: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm as transformers' decoders compute it: in fp32, rounded, then times the weight."""
    wide = rows.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * wide.to(rows.dtype)


def take(table: Tensor, indices: Tensor) -> Tensor:
    """Rows of ``table`` [1 or batch, tokens, size] at ``indices`` [batch, kept]."""
    if table.shape[0] == 1:
        return table[0].index_select(0, indices.reshape(-1)).view(*indices.shape, -1)
    return table.gather(1, indices[..., None].expand(-1, -1, table.shape[-1]))


def reference(
    hidden: Tensor, indices: Tensor, weight: Tensor, epsilon: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `gather`."""
    kept = hidden.gather(1, indices[..., None].expand(-1, -1, hidden.shape[-1]))
    return kept, rms_norm(kept, weight, epsilon), take(cos, indices), take(sin, indices)


@functools.cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["tokens", "slots", "epsilon"])
    def gather_kernel(
        hidden,
        indices,
        weight,
        cos,
        sin,
        kept,
        normed,
        cos_rows,
        sin_rows,
        tokens,
        slots,
        epsilon,
        WIDTH: tl.constexpr,
        HEAD: tl.constexpr,
        SHARED_TABLES: tl.constexpr,
        BLOCK: tl.constexpr,
        HEAD_BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        sample = row // slots
        token = tl.load(indices + row)
        columns = tl.arange(0, BLOCK)
        inside = columns < WIDTH
        x = tl.load(hidden + (sample * tokens + token) * WIDTH + columns, mask=inside, other=0.0)
        tl.store(kept + row * WIDTH + columns, x, mask=inside)
        wide = x.to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / WIDTH + epsilon)
        w = tl.load(weight + columns, mask=inside, other=0.0)
        y = (wide * scale).to(x.dtype).to(tl.float32) * w.to(tl.float32)
        tl.store(normed + row * WIDTH + columns, y.to(x.dtype), mask=inside)

        places = tl.arange(0, HEAD_BLOCK)
        in_head = places < HEAD
        source = (token if SHARED_TABLES else sample * tokens + token) * HEAD + places
        tl.store(cos_rows + row * HEAD + places, tl.load(cos + source, mask=in_head), mask=in_head)
        tl.store(sin_rows + row * HEAD + places, tl.load(sin + source, mask=in_head), mask=in_head)

    return gather_kernel


def _launch(
    hidden: Tensor, indices: Tensor, weight: Tensor, epsilon: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, tokens, width = hidden.shape
    slots, head = indices.shape[1], cos.shape[-1]
    hidden, cos, sin = hidden.contiguous(), cos.contiguous(), sin.contiguous()
    kept = torch.empty(batch, slots, width, dtype=hidden.dtype, device=hidden.device)
    normed = torch.empty_like(kept)
    cos_rows = torch.empty(batch, slots, head, dtype=cos.dtype, device=cos.device)
    sin_rows = torch.empty_like(cos_rows)
    block = block_of(width)
    start(
        _kernel(),
        batch * slots,
        (hidden, indices, weight, cos, sin, kept, normed, cos_rows, sin_rows),
        (tokens, slots, epsilon),
        (width, head, cos.shape[0] == 1, block, block_of(head)),
        warps_of(block),
    )
    return kept, normed, cos_rows, sin_rows


_operator = operator(
    "gather(Tensor hidden, Tensor indices, Tensor weight, float epsilon, Tensor cos, Tensor sin) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference,
    _launch,
)


def gather(
    hidden: Tensor, indices: Tensor, weight: Tensor, epsilon: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The kept tokens, ready for attention.

    Args:
        hidden: Residual stream, [batch, tokens, hidden].
        indices: Kept tokens, int64 [batch, kept].
        weight: Of the RMSNorm before attention, [hidden].
        epsilon: Of that norm.
        cos: Rotary table, [1 or batch, tokens, head_dim].
        sin: As ``cos``.

    Returns:
        Rows, and rows normalised, [batch, kept, hidden]; rows of the tables, [batch, kept, head_dim] each.
    """
    result: tuple[Tensor, Tensor, Tensor, Tensor] = _operator(hidden, indices, weight, epsilon, cos, sin)
    return result
