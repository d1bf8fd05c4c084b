"""Attention that prepares nothing per shape: a p-MoD model has another key length in every layer and every step.

On some GPUs torch's ``scaled_dot_product_attention`` prefers cuDNN, which builds a plan of 20 to 50 ms for every new
shape. A dense model meets one new shape per step, a p-MoD model one in each layer of each step. torch's switches
between back ends are process-wide, so they would touch other models and other threads, and gradient checkpointing
runs outside of a context around ``forward``. Hence an attention function of our own, under a name of its own, that
calls torch's flash and memory-efficient kernels itself. In all else it is transformers' ``sdpa``.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PLAN_FREE = "pmod_sdpa"
"""Name of the implementation; a p-MoD model's parts that would use ``sdpa`` use it."""

SDPA = ("sdpa", PLAN_FREE)
"""Implementations whose own causal path serves where no mask is given."""


def avoid_plans(model: nn.Module) -> None:
    """Give every part of ``model`` that uses transformers' ``sdpa`` the same without plans per shape."""
    for module in model.modules():
        config = module.config if isinstance(module, PreTrainedModel) else None
        if config is not None and config._attn_implementation == "sdpa":
            config._attn_implementation_internal = PLAN_FREE


def plan_free_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The ``sdpa`` of transformers, but on an NVIDIA GPU never through cuDNN.

    Args:
        module: The attention module, which says whether it is causal.
        query: [batch, heads, new, head_dim].
        key: [batch, kv_heads, slots, head_dim].
        value: As ``key``.
        attention_mask: Boolean or additive, broadcastable to [batch, heads, new, slots]; None for the causal path.
        dropout: Share of attention weights dropped.
        scaling: By default ``head_dim ** -0.5``.
        is_causal: By default the module's.
        **kwargs: Those of transformers' function.

    Returns:
        [batch, new, heads, head_dim], and no attention weights.
    """
    if not _may_meet_plans(query, value) or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
    new, slots = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = causal and attention_mask is None and new > 1
    if (
        causal and slots > new
    ):  # an empty cache of fixed size: what lies behind the new tokens is not there yet
        key, value = key[:, :, :new], value[:, :, :new]
    if attention_mask is None and _has_flash(query.device):
        output = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout, causal, scale=scaling
        )[0]
        return output.transpose(1, 2).contiguous(), None
    heads, groups = query.shape[1], query.shape[1] // key.shape[1]
    bias = None if attention_mask is None else aligned_bias(attention_mask, query.dtype)
    if groups > 1 and new == 1 and (bias is None or bias.shape[1] == 1):
        # One query: the heads of a group are as good as several queries, and keys need no copies.
        query = query.reshape(query.shape[0], key.shape[1], groups, query.shape[-1])
    elif groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if bias is not None:
        bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], -1)
    grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    output = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, grad, dropout, causal, scale=scaling
    )[0]
    output = output.reshape(output.shape[0], heads, new, -1) if new == 1 else output
    return output.transpose(1, 2).contiguous(), None


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where the boolean mask is True, else minus infinity."""
    return torch.zeros((), dtype=dtype, device=mask.device).where(mask, float("-inf"))


def aligned_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """An additive mask whose rows lie 16 apart in memory, as the memory-efficient kernel wants them.

    Args:
        mask: True or 0 for what is seen, [..., slots]; an additive mask that is aligned is returned as it is.
        dtype: Of the queries.
    """
    if mask.dtype == torch.bool:
        mask = additive(mask, dtype)
    slots = mask.shape[-1]
    aligned = mask.stride(-1) == 1 and all(
        mask.stride(dim) % 16 == 0 for dim in range(mask.dim() - 1) if mask.shape[dim] > 1
    )
    if aligned and mask.dtype == dtype:
        return mask
    return F.pad(mask.to(dtype), (0, -slots % 16))[..., :slots]


def _may_meet_plans(query: Tensor, value: Tensor) -> bool:
    """Whether torch may choose cuDNN: in half precision, for the sizes of head that it takes, on an NVIDIA GPU."""
    size = query.shape[-1]
    return (
        query.is_cuda
        and torch.version.hip is None
        and query.dtype in (torch.float16, torch.bfloat16)
        and size == value.shape[-1]
        and size % 8 == 0
        and size <= 256
    )


@functools.cache
def _has_flash(device: torch.device) -> bool:
    """Whether torch's flash kernel runs there; a trace on a machine without a GPU is for one that has it."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)


AttentionInterface.register(PLAN_FREE, plan_free_attention)
AttentionMaskInterface.register(PLAN_FREE, sdpa_mask)
