"""The Mixture-of-Depths decoder layer with symmetric token reweighting (STRing).

p-MoD, arXiv 2412.04449, sections 3.1 and 3.2. With ``h = x + attention(norm(x))`` among the kept tokens:
a kept vision token becomes ``h + w * mlp(norm(h))``, a skipped one ``w * x``, a text token ``h + mlp(norm(h))``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from pmod_cli.modeling.cache import KeptTokens
from pmod_cli.modeling.choice import learning_choice
from pmod_cli.modeling.compat import CACHE_ARGUMENT
from pmod_cli.modeling.masks import causal_mask
from pmod_cli.modeling.plan import RoutingPlan
from pmod_cli.modeling.router import Router
from pmod_cli.modeling.routing import FusedRouting, Routing, can_fuse
from pmod_cli.modeling.settings import MoDConfig


class MoDDecoderLayer:
    """Mixed in before a transformers pre-norm decoder layer (Llama, Mistral, Qwen2 ...).

    The baseline's parameters keep their names; ``router`` is the only new module.

    Attributes:
        router: See `Router`.
        retention_ratio: Share of the routed tokens that the layer keeps; None: it runs dense, as if it had no router.
        learns_choice: Whether training goes through the choice of tokens (`pmod_cli.modeling.choice`).
    """

    router: Router
    retention_ratio: float | None
    learns_choice: bool = False

    def add_router(self, hidden_size: int, config: MoDConfig, ratio: float | None) -> None:
        """Give the layer its router and its retention ratio."""
        self.router = Router(hidden_size, config)
        self.retention_ratio = ratio

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        routing_plan: RoutingPlan | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Run the layer on the kept tokens; scale and pass on the others.

        Args:
            hidden_states: Residual stream, [batch, tokens, hidden].
            attention_mask: The model's mask for dense layers; used as it is where this layer's cache is empty
                and nothing is routed.
            position_ids: [1 or batch, tokens].
            position_embeddings: RoPE tables (cos, sin), [1 or batch, tokens, head_dim] each.
            routing_plan: Tokens of this forward pass; None is a chunk without routed tokens or padding.
            **kwargs: Passed on to the attention, among them the KV cache, adopted by `adopt_cache`, under the name
                that transformers gives it.

        Returns:
            Residual stream, [batch, tokens, hidden].
        """
        cache: Cache | None = kwargs.get(CACHE_ARGUMENT)
        store = None if cache is None else cache.layers[self.self_attn.layer_idx]  # type: ignore[attr-defined]
        if routing_plan is not None and routing_plan.routes(self.self_attn.layer_idx):  # type: ignore[attr-defined]
            if self.learns_choice and self.training and torch.is_grad_enabled():  # type: ignore[attr-defined]
                return learning_choice(self, hidden_states, position_embeddings, routing_plan, kwargs)
            return self._routed(hidden_states, position_embeddings, store, routing_plan, kwargs)
        real = None if routing_plan is None else routing_plan.real_mask
        if store is not None and store.started:  # which may have left no slot in use
            attention_mask = store.mask(self.self_attn.config, hidden_states, real)  # type: ignore[attr-defined]
        if store is not None and real is not None:
            store.announce(hidden_states.shape[1], None, real)
        hidden_states = super().forward(  # type: ignore[misc]
            hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        return self._with_router_gradient(hidden_states)

    def _routed(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None,
        store: KeptTokens | None,
        plan: RoutingPlan,
        shared: dict[str, Any],
    ) -> Tensor:
        layer: int = self.self_attn.layer_idx  # type: ignore[attr-defined]
        lengths = plan.kept_lengths[layer]
        assert lengths is not None
        continues = store is not None and store.started
        if plan.fused and not plan.drops_nothing(layer) and can_fuse(self, hidden_states):
            routed: Routing = FusedRouting(self, hidden_states, plan, layer, continues)
        else:
            routed = Routing(self, hidden_states, plan, layer)
        if plan.record is not None:
            plan.record[layer] = routed.record()
        if max(lengths) == 0:
            if store is not None:
                self._announce_nothing(store, hidden_states.shape[1], routed.indices)
            return routed.passed_on
        kept, normed, tables = routed.kept(position_embeddings)
        config = self.self_attn.config  # type: ignore[attr-defined]
        if not continues:
            # Unused slots lie behind all kept tokens, where causal attention never sees them.
            attention_mask = causal_mask(config, kept, 0, routed.hidden)
        else:
            assert store is not None
            attention_mask = store.mask(config, kept, routed.valid)
        if store is not None:
            store.announce(hidden_states.shape[1], routed.indices, routed.valid)
        attended, _ = self.self_attn(  # type: ignore[attr-defined]
            hidden_states=normed,
            attention_mask=attention_mask,
            # No position ids: flash attention takes ids with gaps for several sequences packed in one. RoPE has its
            # tables, the causal mask goes by the order of the slots.
            position_embeddings=tables,
            **shared,
        )
        residual, normed = routed.before_mlp(kept, attended)
        return routed.joined(residual, self.mlp(normed))  # type: ignore[attr-defined]

    def _with_router_gradient(self, hidden_states: Tensor) -> Tensor:
        """In training, a zero gradient for the router: sharded training waits for every parameter's."""
        if not (self.training and torch.is_grad_enabled()):  # type: ignore[attr-defined]
            return hidden_states
        total = torch.stack([parameter.sum() for parameter in self.router.parameters()]).sum()
        return hidden_states + (0.0 * total).to(hidden_states.dtype)

    def _announce_nothing(self, store: KeptTokens, length: int, indices: Tensor) -> None:
        """A chunk of which the layer keeps no token still lengthens the sequence."""
        attention = self.self_attn  # type: ignore[attr-defined]
        heads, size = attention.config.num_key_value_heads, attention.head_dim
        weight = attention.k_proj.weight
        empty = torch.empty(indices.shape[0], heads, 0, size, dtype=weight.dtype, device=indices.device)
        store.announce(length, indices, None)
        store.update(empty, empty)
