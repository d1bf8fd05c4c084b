"""Causal attention masks over a layer's own slots, in the form that each attention implementation takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from pmod_cli.modeling.attention import SDPA, additive, aligned_bias

__all__ = ["additive", "causal_mask", "join_valid", "takes_additive"]


def causal_mask(config: Any, queries: Tensor, past: int, valid: Tensor | None) -> Any:
    """The mask for ``new`` queries at the end of ``past + new`` slots.

    Nothing is read from the device, unlike in transformers' own mask functions, which look whether a padding
    mask hides anything.

    Args:
        config: The decoder's config; names the attention implementation.
        queries: [batch, new, hidden].
        past: Slots before them.
        valid: False for slots that nobody may see, [batch, past + new]; None if there are none.

    Returns:
        None where the implementation's own causal path serves; a 2-D mask for flash attention; else a 4-D mask
        or a block mask.
    """
    batch, new = queries.shape[:2]
    implementation = config._attn_implementation
    if "flash" in implementation:
        return valid
    if implementation in SDPA and valid is None and (new == 1 or past == 0):
        return None  # the kernel's own causal path, or a single query that sees everything

    def visible(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        causal = key <= query
        if valid is None:
            return causal
        # An unused slot sees itself: a row without any key would be NaN, and spread in the backward pass.
        return causal & (valid[sample, key] | (key == query))

    mask = ALL_MASK_ATTENTION_FUNCTIONS[implementation](
        batch_size=batch,
        q_length=new,
        kv_length=past + new,
        q_offset=past,
        mask_function=visible,
        attention_mask=None,
        allow_is_causal_skip=False,
        dtype=queries.dtype,
        device=queries.device,
        config=config,
    )
    # The kernel that takes masks wants an additive one; once here is cheaper than in each layer.
    return aligned_bias(mask, queries.dtype) if implementation in SDPA and queries.is_cuda else mask


def takes_additive(config: Any) -> bool:
    """Whether the decoder's attention takes an additive 4-D mask."""
    return config._attn_implementation in (*SDPA, "eager")


def join_valid(
    past: Tensor | None, new: Tensor | None, batch: int, slots: int, added: int, device: Any
) -> Tensor | None:
    """One mask for stored and new slots; None if both have only used slots.

    Args:
        past: [batch, slots] or None for all in use.
        new: [batch, added] or None for all in use.
        batch: Samples.
        slots: Stored slots.
        added: New slots.
        device: Where the mask goes.
    """
    if past is None and new is None:
        return None
    past = torch.ones(batch, slots, dtype=torch.bool, device=device) if past is None else past
    new = torch.ones(batch, added, dtype=torch.bool, device=device) if new is None else new
    return torch.cat([past, new], dim=-1)
