"""Scatter: the processed tokens, their MLP branch reweighted, back to their places in the residual."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from pmod_cli.modeling.kernels.launch import block_of, operator, start, warps_of


def reference(
    passed: Tensor, residual: Tensor, branch: Tensor, weights: Tensor, indices: Tensor, lengths: Tensor
) -> None:
    """See `scatter`."""
    width = passed.shape[-1]
    spread = indices[..., None].expand(-1, -1, width)
    processed = torch.addcmul(residual, branch, weights.gather(1, indices).to(passed.dtype)[..., None])
    used = torch.arange(indices.shape[1], device=indices.device) < lengths[:, None]
    processed = torch.where(used[..., None], processed, passed.gather(1, spread))
    passed.scatter_(1, spread, processed)


@functools.cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["tokens", "slots"])
    def scatter_kernel(
        passed,
        residual,
        branch,
        weights,
        indices,
        lengths,
        tokens,
        slots,
        WIDTH: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        sample = row // slots
        used = row % slots < tl.load(lengths + sample)
        place = sample * tokens + tl.load(indices + row)
        columns = tl.arange(0, BLOCK)
        inside = columns < WIDTH
        x = tl.load(residual + row * WIDTH + columns, mask=inside, other=0.0)
        y = tl.load(branch + row * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weights + place).to(x.dtype).to(tl.float32)
        result = (x.to(tl.float32) + y * weight).to(x.dtype)
        tl.store(passed + place * WIDTH + columns, result, mask=inside & used)

    return scatter_kernel


def _launch(
    passed: Tensor, residual: Tensor, branch: Tensor, weights: Tensor, indices: Tensor, lengths: Tensor
) -> None:
    _, tokens, width = passed.shape
    batch, slots = indices.shape
    block = block_of(width)
    start(
        _kernel(),
        batch * slots,
        (passed, residual.contiguous(), branch.contiguous(), weights, indices, lengths),
        (tokens, slots),
        (width, block),
        warps_of(block),
    )


_operator = operator(
    "scatter(Tensor(a!) passed, Tensor residual, Tensor branch, Tensor weights, Tensor indices, Tensor lengths) -> ()",
    reference,
    _launch,
)


def scatter(
    passed: Tensor, residual: Tensor, branch: Tensor, weights: Tensor, indices: Tensor, lengths: Tensor
) -> None:
    """Write ``residual + weight * branch`` over the kept tokens, in place; unused slots write nothing.

    Args:
        passed: The weighted residual of all tokens, contiguous [batch, tokens, hidden]; changed.
        residual: Of the kept tokens, [batch, kept, hidden].
        branch: What the MLP gave, [batch, kept, hidden].
        weights: Of all tokens, fp32 [batch, tokens]; rounded to the model's dtype.
        indices: Kept tokens, int64 [batch, kept].
        lengths: How many of them are used, int32 [batch].
    """
    _operator(passed, residual, branch, weights, indices, lengths)
