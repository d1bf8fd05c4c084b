"""Select: the tokens that a layer keeps, by a binary search for the last key and a prefix sum."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from pmod_cli.modeling.kernels.launch import block_of, operator, start, warps_of

MOST_TOKENS = 32768
"""A sample's keys are held in registers; longer prompts take PyTorch's top-k."""


def reference(keys: Tensor, lengths: Tensor, slots: int) -> Tensor:
    """See `select`."""
    top = keys.topk(slots, dim=-1).indices
    behind = (torch.arange(slots, device=keys.device) >= lengths[:, None]) * keys.shape[1]
    indices: Tensor = (top + behind).sort(dim=-1).values - behind
    return indices


@functools.cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["tokens", "slots"])
    def select_kernel(keys, lengths, indices, tokens, slots, BLOCK: tl.constexpr):
        sample = tl.program_id(0).to(tl.int64)
        places = tl.arange(0, BLOCK)
        inside = places < tokens
        lowest = -0x8000000000000000
        key = tl.load(keys + sample * tokens + places, mask=inside, other=lowest)
        kept = tl.load(lengths + sample)

        # The largest threshold that as many keys reach, bit by bit: first the sign, then the others.
        threshold = tl.full((), lowest, tl.int64)
        reached = tl.sum((key >= 0).to(tl.int32), axis=0)
        threshold = tl.where(reached >= kept, tl.zeros((), tl.int64), threshold)
        for step in range(63):
            one = tl.full((), 1, tl.int64)
            candidate = threshold + (one << (62 - step))
            reached = tl.sum((key >= candidate).to(tl.int32), axis=0)
            threshold = tl.where(reached >= kept, candidate, threshold)

        keep = inside & (key >= threshold) & (kept > 0)
        slot = tl.cumsum(keep.to(tl.int32), axis=0) - 1
        tl.store(indices + sample * slots + slot, places.to(tl.int64), mask=keep & (slot < slots))
        # Unused slots of a sample that keeps fewer than others: tokens that it does not keep.
        spare = inside & (keep == 0)
        slot = kept + tl.cumsum(spare.to(tl.int32), axis=0) - 1
        tl.store(indices + sample * slots + slot, places.to(tl.int64), mask=spare & (slot < slots))

    return select_kernel


def _launch(keys: Tensor, lengths: Tensor, slots: int) -> Tensor:
    batch, tokens = keys.shape
    indices = torch.empty(batch, slots, dtype=torch.int64, device=keys.device)
    block = block_of(tokens)
    start(_kernel(), batch, (keys, lengths, indices), (tokens, slots), (block,), warps_of(block))
    return indices


_operator = operator("select(Tensor keys, Tensor lengths, int slots) -> Tensor", reference, _launch)


def select(keys: Tensor, lengths: Tensor, slots: int) -> Tensor:
    """`select_tokens`.

    Args:
        keys: What `route` gave, [batch, tokens], no two of a sample's routed tokens alike; at most `MOST_TOKENS`.
        lengths: How many tokens each sample keeps, text included, int32 [batch].
        slots: The largest of them.

    Returns:
        Indices, int64 [batch, slots]: a sample's kept tokens ascending, then some that it does not keep.
    """
    indices: Tensor = _operator(keys, lengths, slots)
    return indices
