"""What a dense forward pass shows of each layer: the vision tokens that go in, and the attention that text pays them.

Attention is seen where the model computes it, through an attention function that also scores the rows behind the
pictures. So it works for every decoder, and no layer makes the whole [tokens, tokens] matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from pmod_cli.modeling.attention import plan_free_attention
from pmod_cli.modeling.plan import RoutingPlan

OBSERVED = "pmod_observed"
"""Name of the attention implementation while a pass is observed."""

States = Callable[[int, Tensor], None]
"""Called with a layer and its routed tokens as they go in, [tokens of all samples, hidden]."""

Scores = Callable[[int, Tensor], None]
"""Called with a layer and the mean attention, over heads and over the text behind the pictures, that its routed tokens
get, fp32 [tokens of all samples]."""


class _Pass:
    """One forward pass: which tokens are routed, and which rows look at them."""

    def __init__(self, scores: Scores | None) -> None:
        self.scores = scores

    def start(self, plan: RoutingPlan) -> None:
        """Find the text behind the pictures."""
        assert plan.target_mask is not None
        self.target, real = plan.target_mask, plan.real_mask
        behind = self.target.flip(-1).cumsum(-1).flip(-1) == 0
        behind = behind if real is None else behind & real
        first = int(behind.any(0).long().argmax())
        self.rows, self.behind = slice(first, None), behind[:, first:]
        places = torch.arange(self.target.shape[1], device=self.target.device)
        seen = (places <= places[self.rows, None])[None]
        self.seen = seen if real is None else seen & real[:, None]


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    now: _Pass = module.observed
    assert now.scores is not None
    now.scores(module.layer_idx, text_attention(query, key, options.get("scaling"), now))
    return plan_free_attention(module, query, key, value, attention_mask, **options)


def text_attention(query: Tensor, key: Tensor, scaling: float | None, now: _Pass) -> Tensor:
    """Mean attention that text behind the pictures pays to each routed token, over heads and rows of its sample.

    Args:
        query: [batch, heads, tokens, head_dim].
        key: [batch, kv_heads, tokens, head_dim].
        scaling: By default ``head_dim ** -0.5``.
        now: The pass.

    Returns:
        fp32 [routed tokens of all samples].
    """
    rows = query[:, :, now.rows]
    groups = query.shape[1] // key.shape[1]
    total = torch.zeros(now.target.shape, dtype=torch.float32, device=query.device)
    weight = now.behind.float()
    weight = weight / weight.sum(-1, keepdim=True).clamp(min=1)
    for head in range(query.shape[1]):  # one at a time: all of them would be a matrix per head
        logits = rows[:, head].float() @ key[:, head // groups].float().mT
        logits = logits * (scaling or query.shape[-1] ** -0.5)
        share = logits.masked_fill(~now.seen, torch.finfo(torch.float32).min).softmax(-1)
        total += (weight[:, None] @ share)[:, 0]
    return total[now.target] / query.shape[1]


AttentionInterface.register(OBSERVED, _attention)
AttentionMaskInterface.register(OBSERVED, sdpa_mask)


@contextmanager
def observing(decoder: Any, states: States | None = None, scores: Scores | None = None) -> Iterator[None]:
    """Observe every forward pass of a p-MoD decoder while the block runs.

    Args:
        decoder: The p-MoD language model, all of whose layers run dense where ``scores`` are wanted.
        states: Told of each layer's routed tokens.
        scores: Told of their attention.
    """
    now, config = _Pass(scores), decoder.config

    def look(index: int, args: Any) -> None:
        assert states is not None
        states(index, args[0][now.target])

    with ExitStack() as stack:
        handles = [
            decoder.register_forward_pre_hook(
                lambda _, args, kwargs: now.start(kwargs["routing_plan"]), with_kwargs=True
            )
        ]
        for index, layer in enumerate(decoder.layers):
            if states is not None:
                hook = layer.register_forward_pre_hook(lambda _, args, index=index: look(index, args))
                handles.append(hook)
            if scores is not None:
                layer.self_attn.observed = now
                stack.callback(delattr, layer.self_attn, "observed")
        for handle in handles:
            stack.callback(handle.remove)
        if scores is not None:
            before = config._attn_implementation_internal
            config._attn_implementation_internal = OBSERVED
            stack.callback(setattr, config, "_attn_implementation_internal", before)
        yield
