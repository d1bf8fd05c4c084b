"""The Mixture-of-Depths decoder layer with symmetric token reweighting (STRing).

p-MoD, arXiv 2412.04449, sections 3.1 and 3.2. With ``h = x + attention(norm(x))`` among the kept tokens:
a kept vision token becomes ``h + w * mlp(norm(h))``, a skipped one ``w * x``, a text token ``h + mlp(norm(h))``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from pmod_cli.modeling.cache import KeptTokensLayer
from pmod_cli.modeling.compat import CACHE_ARGUMENT
from pmod_cli.modeling.masks import causal_mask, join_valid
from pmod_cli.modeling.plan import LayerRouting, RoutingPlan
from pmod_cli.modeling.router import Router, select_tokens, selection_keys
from pmod_cli.modeling.settings import MoDConfig


class MoDDecoderLayer:
    """Mixed in before a transformers pre-norm decoder layer (Llama, Mistral, Qwen2 ...).

    The baseline's parameters keep their names; ``router`` is the only new module.

    Attributes:
        router: See `Router`.
        retention_ratio: Share of the routed tokens that the layer keeps.
    """

    router: Router
    retention_ratio: float

    def add_router(self, hidden_size: int, config: MoDConfig, ratio: float) -> None:
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
        if routing_plan is None or routing_plan.target_mask is None:
            if store is not None and store.length:  # which may have left no slot in use
                real = None if routing_plan is None else routing_plan.real_mask
                attention_mask = self._mask(hidden_states, store, real)
            if store is not None and routing_plan is not None:
                store.announce(hidden_states.shape[1], None, routing_plan.real_mask)
            hidden_states = super().forward(  # type: ignore[misc]
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                position_embeddings=position_embeddings,
                **kwargs,
            )
            return self._with_router_gradient(hidden_states)
        return self._routed(hidden_states, position_embeddings, store, routing_plan, kwargs)

    def _routed(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None,
        store: KeptTokensLayer | None,
        plan: RoutingPlan,
        shared: dict[str, Any],
    ) -> Tensor:
        batch, length, width = hidden_states.shape
        assert plan.target_mask is not None
        assert plan.rank is not None
        logits = self.router(hidden_states)
        weights = self.router.weights(logits, plan.target_mask)
        keys = selection_keys(logits, plan.target_mask, plan.real_mask, plan.rank)
        layer: int = self.self_attn.layer_idx  # type: ignore[attr-defined]
        lengths = plan.kept_lengths[layer]
        assert lengths is not None
        indices, valid = select_tokens(keys, lengths)
        if plan.record is not None:
            plan.record[layer] = _routing(logits, weights, indices, valid)

        weights = weights.to(hidden_states.dtype).view(-1, 1)
        flat = hidden_states.reshape(-1, width)
        passed_on = flat * weights
        if indices.shape[1] == 0:
            if store is not None:
                self._announce_nothing(store, length, indices)
            return passed_on.view(batch, length, width)

        # One list of rows of the flattened batch serves the gather and the scatter.
        rows = (
            indices if batch == 1 else indices + length * torch.arange(batch, device=indices.device)[:, None]
        )
        rows = rows.reshape(-1)
        kept = flat.index_select(0, rows).view(batch, -1, width)
        attention_mask = self._mask(kept, store, valid)
        if store is not None:
            store.announce(length, indices, valid)
        attended, _ = self.self_attn(  # type: ignore[attr-defined]
            hidden_states=self.input_layernorm(kept),  # type: ignore[attr-defined]
            attention_mask=attention_mask,
            # No position ids: flash attention takes ids with gaps for several sequences packed in one. RoPE has its
            # tables, the causal mask goes by the order of the slots.
            position_embeddings=tuple(_take(table, indices) for table in position_embeddings or ()),
            **shared,
        )
        residual = kept + attended
        branch = self.mlp(self.post_attention_layernorm(residual))  # type: ignore[attr-defined]
        processed = torch.addcmul(
            residual.view(-1, width), branch.view(-1, width), weights.index_select(0, rows)
        )
        if valid is not None:
            # An unused slot points at a token that the sample does not keep: it stays as it was passed on.
            processed = torch.where(valid.view(-1, 1), processed, passed_on.index_select(0, rows))
        return passed_on.index_copy_(0, rows, processed).view(batch, length, width)

    def _mask(self, queries: Tensor, store: KeptTokensLayer | None, valid: Tensor | None) -> Any:
        """Causal mask among this layer's own slots.

        Args:
            queries: [batch, new slots, hidden].
            store: The layer's cache before these are added, or None.
            valid: False for unused or padding slots among the new ones, [batch, new slots], or None.
        """
        batch, new = queries.shape[:2]
        past = 0 if store is None else store.slots
        stored = None if store is None else store.valid
        joined = join_valid(stored, valid, batch, past, new, queries.device)
        return causal_mask(self.self_attn.config, queries, past, joined)  # type: ignore[attr-defined]

    def _with_router_gradient(self, hidden_states: Tensor) -> Tensor:
        """In training, a zero gradient for the router: sharded training waits for every parameter's."""
        if not (self.training and torch.is_grad_enabled()):  # type: ignore[attr-defined]
            return hidden_states
        total = torch.stack([parameter.sum() for parameter in self.router.parameters()]).sum()
        return hidden_states + (0.0 * total).to(hidden_states.dtype)

    def _announce_nothing(self, store: KeptTokensLayer, length: int, indices: Tensor) -> None:
        """A chunk of which the layer keeps no token still lengthens the sequence."""
        attention = self.self_attn  # type: ignore[attr-defined]
        heads, size = attention.config.num_key_value_heads, attention.head_dim
        weight = attention.k_proj.weight
        empty = torch.empty(indices.shape[0], heads, 0, size, dtype=weight.dtype, device=indices.device)
        store.announce(length, indices, None)
        store.update(empty, empty)


def _take(tensor: Tensor, indices: Tensor) -> Tensor:
    """Rows of ``tensor`` [1 or batch, tokens, size] at ``indices`` [batch, kept]."""
    if tensor.shape[0] == 1:
        return tensor[0].index_select(0, indices.reshape(-1)).view(*indices.shape, -1)
    return tensor.gather(1, indices[..., None].expand(-1, -1, tensor.shape[-1]))


def _routing(logits: Tensor, weights: Tensor, indices: Tensor, valid: Tensor | None) -> LayerRouting:
    kept = torch.zeros_like(logits, dtype=torch.bool)
    kept = kept.scatter(1, indices, True if valid is None else valid)
    return LayerRouting(logits, weights, kept, indices, valid)
