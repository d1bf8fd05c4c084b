"""What one Mixture-of-Depths layer does around its attention and MLP: in PyTorch, and with fused kernels.

Both give the same four things: which tokens are kept, those tokens ready for attention, ready for the MLP, and back in
the residual stream.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pmod_cli.modeling.kernels.add_norm import add_norm
from pmod_cli.modeling.kernels.gather import gather, take
from pmod_cli.modeling.kernels.route import NORMS, route
from pmod_cli.modeling.kernels.scatter import scatter
from pmod_cli.modeling.kernels.select import MOST_TOKENS, select
from pmod_cli.modeling.plan import LayerRouting, RoutingPlan
from pmod_cli.modeling.router import select_tokens, selection_keys

Tables = tuple[Tensor, ...]
"""Rows of the rotary tables (cos, sin), [batch, kept, head_dim] each."""


class Routing:
    """In PyTorch: on every device, under autograd and ``torch.compile``.

    Attributes:
        indices: Kept tokens, [batch, longest]; see `select_tokens`.
        valid: False for unused slots, [batch, longest]; None if all are used.
        hidden: The same where unused slots lie between kept tokens, and attention needs a mask; else None.
        passed_on: Every token times its weight, [batch, tokens, hidden].
    """

    def __init__(self, layer: Any, hidden_states: Tensor, plan: RoutingPlan, index: int) -> None:
        self.layer, self.shape = layer, hidden_states.shape
        assert plan.target_mask is not None
        assert plan.rank is not None
        self.logits = layer.router(hidden_states)
        self.weights = layer.router.weights(self.logits, plan.target_mask)
        self.hidden = None
        if plan.drops_nothing(index):
            self.indices = torch.arange(self.shape[1], device=hidden_states.device).expand(self.shape[0], -1)
            self.valid = self.hidden = plan.real_mask
        else:
            keys = selection_keys(self.logits, plan.target_mask, plan.real_mask, plan.rank[index])
            on_device = None if plan.device_lengths is None else plan.device_lengths[index]
            self.indices, self.valid = select_tokens(keys, plan.kept_lengths[index] or [], on_device)
        batch, tokens, width = self.shape
        # One list of rows of the flattened batch serves the gather and the scatter.
        rows = self.indices
        if batch > 1:
            rows = rows + tokens * torch.arange(batch, device=rows.device)[:, None]
        self.rows = rows.reshape(-1)
        self.flat = hidden_states.reshape(-1, width)
        self.flat_weights = self.weights.to(hidden_states.dtype).view(-1, 1)
        self.passed_on = (self.flat * self.flat_weights).view(self.shape)

    def record(self) -> LayerRouting:
        """For the caller's `RoutingRecord`."""
        kept = torch.zeros_like(self.logits, dtype=torch.bool)
        kept = kept.scatter(1, self.indices, True if self.valid is None else self.valid)
        return LayerRouting(self.logits, self.weights, kept, self.indices, self.valid)

    def kept(self, tables: Tables | None) -> tuple[Tensor, Tensor, Tables]:
        """Kept tokens, the same normalised, [batch, longest, hidden] each, and their rows of the rotary tables."""
        batch, _, width = self.shape
        kept = self.flat.index_select(0, self.rows).view(batch, -1, width)
        return kept, self.layer.input_layernorm(kept), tuple(take(t, self.indices) for t in tables or ())

    def before_mlp(self, kept: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the two and the same normalised, [batch, longest, hidden] each."""
        residual = kept + attended
        return residual, self.layer.post_attention_layernorm(residual)

    def joined(self, residual: Tensor, branch: Tensor) -> Tensor:
        """Kept tokens with their weighted branch, the others as passed on, [batch, tokens, hidden]."""
        width = self.shape[-1]
        flat = self.passed_on.view(-1, width)
        processed = torch.addcmul(
            residual.view(-1, width), branch.view(-1, width), self.flat_weights.index_select(0, self.rows)
        )
        if self.valid is not None:
            # An unused slot points at a token that the sample does not keep: it stays as it was passed on.
            processed = torch.where(self.valid.view(-1, 1), processed, flat.index_select(0, self.rows))
        return flat.index_copy_(0, self.rows, processed).view(self.shape)


SLOTS = 32
"""A single sample's kept tokens are rounded up to a multiple of it where nothing is cached yet.

A GPU's matrix products are planned anew for each number of rows that they have not seen, and a p-MoD model has
another number in each layer of each prompt: rounded, those of all prompts are soon seen.
"""


class FusedRouting(Routing):
    """With fused kernels: one launch where `Routing` has ten, for inference.

    Attributes:
        rows: Kept tokens with those that fill up the slots, which lie behind, where causal attention never sees them,
            [batch, slots].
    """

    def __init__(
        self, layer: Any, hidden_states: Tensor, plan: RoutingPlan, index: int, continues: bool
    ) -> None:
        self.layer, self.hidden_states = layer, hidden_states
        assert plan.target_mask is not None
        assert plan.rank is not None
        assert plan.device_lengths is not None
        router, lengths = layer.router, plan.kept_lengths[index]
        assert lengths is not None
        self.logits, self.weights, keys, self.passed_on = route(
            hidden_states,
            router.weight,
            router.bias,
            plan.target_mask,
            plan.real_mask,
            plan.rank[index],
            norm=router.norm,
            offset=router.offset,
            scale=router.scale,
        )
        self.lengths, longest = plan.device_lengths[index], max(lengths)
        batch, tokens = keys.shape
        slots = longest if batch > 1 or continues else min(longest + -longest % SLOTS, tokens)
        self.rows = select(keys, self.lengths, slots)
        self.indices = self.rows[:, :longest]
        self.valid = self.hidden = None
        if min(lengths) < longest:
            self.valid = torch.arange(longest, device=keys.device) < self.lengths[:, None]

    def kept(self, tables: Tables | None) -> tuple[Tensor, Tensor, Tables]:
        """See `Routing.kept`."""
        if tables is None or len(tables) != 2:
            raise ValueError("a layer with fused kernels needs rotary tables (cos, sin)")
        norm = self.layer.input_layernorm
        kept, normed, cos, sin = gather(
            self.hidden_states, self.rows, norm.weight, norm.variance_epsilon, *tables
        )
        return kept, normed, (cos, sin)

    def before_mlp(self, kept: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """See `Routing.before_mlp`."""
        norm = self.layer.post_attention_layernorm
        return add_norm(kept, attended, norm.weight, norm.variance_epsilon)

    def joined(self, residual: Tensor, branch: Tensor) -> Tensor:
        """See `Routing.joined`."""
        scatter(self.passed_on, residual, branch, self.weights, self.rows, self.lengths)
        return self.passed_on


def can_fuse(layer: Any, hidden_states: Tensor) -> bool:
    """Whether the fused kernels can stand for this layer's modules, here and now.

    Not under autograd or ``torch.compile``, and not where a norm is no plain RMSNorm, where somebody watches the
    modules with hooks, or where they are kept on another device until they are called.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or layer.router.norm not in NORMS:
        return False
    if hidden_states.shape[1] > MOST_TOKENS or torch.is_autocast_enabled(hidden_states.device.type):
        return False
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    return all(
        hasattr(norm, "variance_epsilon") and getattr(norm, "bias", None) is None for norm in norms
    ) and all(
        module.weight.device == hidden_states.device
        and not module._forward_hooks
        and not module._forward_pre_hooks
        for module in (layer.router, *norms)
    )
