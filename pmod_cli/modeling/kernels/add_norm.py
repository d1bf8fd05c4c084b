"""Add and norm: residual plus attention, and the same normalised (RMSNorm) for the MLP."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from pmod_cli.modeling.kernels.gather import rms_norm
from pmod_cli.modeling.kernels.launch import block_of, operator, start, warps_of


def reference(residual: Tensor, branch: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """See `add_norm`."""
    total = residual + branch
    return total, rms_norm(total, weight, epsilon)


@functools.cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["epsilon"])
    def add_norm_kernel(
        residual, branch, weight, total, normed, epsilon, WIDTH: tl.constexpr, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, BLOCK)
        inside = columns < WIDTH
        place = row * WIDTH + columns
        x = tl.load(residual + place, mask=inside, other=0.0)
        added = x.to(tl.float32) + tl.load(branch + place, mask=inside, other=0.0).to(tl.float32)
        rounded = added.to(x.dtype)
        tl.store(total + place, rounded, mask=inside)
        wide = rounded.to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / WIDTH + epsilon)
        w = tl.load(weight + columns, mask=inside, other=0.0)
        y = (wide * scale).to(x.dtype).to(tl.float32) * w.to(tl.float32)
        tl.store(normed + place, y.to(x.dtype), mask=inside)

    return add_norm_kernel


def _launch(residual: Tensor, branch: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    residual, branch = residual.contiguous(), branch.contiguous()
    total, normed = torch.empty_like(residual), torch.empty_like(residual)
    width = residual.shape[-1]
    block = block_of(width)
    tensors = (residual, branch, weight, total, normed)
    start(_kernel(), residual.numel() // width, tensors, (epsilon,), (width, block), warps_of(block))
    return total, normed


_operator = operator(
    "add_norm(Tensor residual, Tensor branch, Tensor weight, float epsilon) -> (Tensor, Tensor)",
    reference,
    _launch,
)


def add_norm(residual: Tensor, branch: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The residual with a branch added, and normalised.

    Args:
        residual: [batch, kept, hidden].
        branch: What attention gave, [batch, kept, hidden].
        weight: Of the RMSNorm before the MLP, [hidden].
        epsilon: Of that norm.

    Returns:
        The sum and the normalised sum, [batch, kept, hidden] each.
    """
    result: tuple[Tensor, Tensor] = _operator(residual, branch, weight, epsilon)
    return result
