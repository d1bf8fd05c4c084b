"""The KV cache of a Mixture-of-Depths layer: it holds the kept tokens and nothing else.

`KeptTokensLayer` grows, as a `DynamicCache` does; `StaticKeptTokensLayer` has a fixed capacity, found at the prefill,
so that a decode step has fixed shapes and can be compiled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from pmod_cli.modeling.masks import additive, causal_mask, join_valid, takes_additive

GROWTH = 64
"""Slots by which a decode step's mask is made longer than needed, so that most steps do not touch it."""

BUCKET = 64
"""Fixed capacities are whole buckets, so that prompts of like size share a compiled step; rows of masks are aligned."""


class KeptTokensLayer(DynamicLayer):
    """One layer's keys and values, [batch, kv_heads, kept tokens, head_dim], in a `DynamicCache`.

    Its *sequence length* is that of the whole sequence, dropped tokens included, so that positions may be read
    from any layer; its *slots* are the tokens stored. Samples that kept fewer tokens than the batch's longest
    leave slots unused; ``valid`` tells which.

    Attributes:
        length: Tokens seen, kept or not.
        positions: Index in the sequence of the slots up to the last routed chunk, [batch, slots]. The slots
            behind them, one per token, are the end of the sequence.
    """

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._clear()

    def _clear(self) -> None:
        self.length = 0
        self._used: Tensor | None = None  # of the first slots; those behind are all used
        self._bias: Tensor | None = None  # the same as an additive mask, with room behind
        self.positions: Tensor | None = None
        self._announced: tuple[int, Tensor | None, Tensor | None] | None = None

    @property
    def slots(self) -> int:
        """Number of tokens stored for the sample that has most."""
        return self.keys.shape[-2] if self.is_initialized and self.keys.dim() > 1 else 0

    @property
    def started(self) -> bool:
        """Whether it has seen tokens, of which it may have kept none."""
        return self.length > 0

    @property
    def valid(self) -> Tensor | None:
        """False for unused slots, [batch, slots]; None if every slot is in use."""
        return (
            None if self._used is None else F.pad(self._used, (0, self.slots - self._used.shape[1]), value=1)
        )

    def mask(self, config: Any, queries: Tensor, valid: Tensor | None) -> Any:
        """What the next tokens may see of the slots with theirs added; call it before `update`.

        Args:
            config: See `causal_mask`.
            queries: [batch, new, hidden].
            valid: False for unused slots among the new ones, [batch, new]; None if all are used.
        """
        batch, new = queries.shape[:2]
        if new == 1 and valid is None and self._used is not None and takes_additive(config):
            slots = self.slots + 1
            if self._bias is None or self._bias.shape[1] < slots:
                room = slots + GROWTH
                used = F.pad(self._used, (0, room + -room % 16 - self._used.shape[1]), value=1)
                self._bias = additive(used, queries.dtype)
            return self._bias[:, None, None, :slots]
        joined = join_valid(self.valid, valid, batch, self.slots, new, queries.device)
        return causal_mask(config, queries, self.slots, joined)

    def announce(self, length: int, indices: Tensor | None, valid: Tensor | None) -> None:
        """Say what the next `update` brings.

        Args:
            length: Tokens of the chunk, dropped ones included.
            indices: Which of them are kept, [batch, slots]; None if all are.
            valid: False for unused slots, [batch, slots]; None if all are used.
        """
        self._announced = (length, indices, valid)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values of the kept tokens, [batch, kv_heads, kept, head_dim]; return all of them.

        Rows behind those that were announced fill up the slots of a fused layer: they are returned, not stored.
        """
        batch, _, new, _ = key_states.shape
        length, indices, valid = self._announced or (new, None, None)
        self._announced = None
        first = not self.started
        if valid is not None:
            self._used = join_valid(self.valid, valid, batch, self.slots, new, key_states.device)
            self._bias = None
        if indices is not None:
            self.positions = torch.cat([self._all_positions(batch, indices), indices + self.length], dim=-1)
        self.length += length
        if first:  # nothing to append to: no copy
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            kept = new if indices is None else indices.shape[1]
            self.keys, self.values = key_states[..., :kept, :], value_states[..., :kept, :]
            return key_states, value_states
        return super().update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self) -> int:
        """Tokens seen, dropped ones included."""
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of the sequence; of those, the ones that were kept leave the cache.

        Args:
            tokens_to_remove: Minus the number of tokens (a positive number is, as in transformers 5.17, the
                length that should remain).
        """
        count = -tokens_to_remove if tokens_to_remove <= 0 else max(self.length - tokens_to_remove, 0)
        count = min(count, self.length)
        if count == 0:
            return
        routed = 0 if self.positions is None else self.positions.shape[-1]
        remaining = self.slots - count
        if remaining < routed:
            # The cut goes into a routed chunk: which slots leave depends on what each sample kept.
            assert self.positions is not None
            inside = self.positions < self.length - count
            if self.valid is not None:
                inside &= self.valid[:, :routed]
            places = torch.arange(1, routed + 1, device=inside.device)
            remaining = int((inside * places).max()) if routed else 0
            self.positions = self.positions[:, :remaining]
            inside = inside[:, :remaining]
            self._used = None if bool(inside.all()) else inside
        elif self._used is not None:
            self._used = self._used[:, :remaining]
        self._bias = None
        self.keys, self.values = self.keys[..., :remaining, :], self.values[..., :remaining, :]
        self.length -= count

    def reset(self) -> None:
        """Empty the cache."""
        # Dropped, not zeroed as before transformers 5.24: what is appended must be all there is.
        self.keys = self.values = None  # type: ignore[assignment]
        self.is_initialized = False
        self._clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these samples."""
        self._map(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def _map(self, function: Any) -> None:
        if not self.is_initialized or self.keys.dim() == 1:
            return
        self.keys, self.values = function(self.keys), function(self.values)
        self._used = None if self._used is None else function(self._used)
        self._bias = None
        self.positions = None if self.positions is None else function(self.positions)

    def _all_positions(self, batch: int, like: Tensor) -> Tensor:
        """Sequence index of every slot, [batch, slots]."""
        routed = 0 if self.positions is None else self.positions.shape[-1]
        tail = torch.arange(self.length - (self.slots - routed), self.length, device=like.device)
        tail = tail.expand(batch, -1)
        return tail if self.positions is None else torch.cat([self.positions, tail], dim=-1)


class StaticKeptTokensLayer(StaticLayer):
    """One layer's keys and values in a `StaticCache`: room for the tokens that the prefill keeps and the new ones.

    Dense layers of a p-MoD model have it too; they keep every token. The prefill attends to its own tokens, not to
    the whole capacity, and need not be compiled.

    Attributes:
        capacity: Slots, known at the first `update`.
        filled: Slots in use or left unused by shorter samples, a tensor of one number.
        used: True for slots that are in use, [batch, capacity].
    """

    capacity: int
    filled: Tensor
    used: Tensor

    def __init__(self, max_cache_len: int) -> None:
        super().__init__(max_cache_len=max_cache_len)
        self._announced: tuple[int, Tensor | None, Tensor | None] | None = None

    @property
    def started(self) -> bool:
        """Whether it has seen tokens, of which it may have kept none."""
        return bool(self.is_initialized)

    def announce(self, length: int, indices: Tensor | None, valid: Tensor | None) -> None:
        """As `KeptTokensLayer.announce`."""
        self._announced = (length, indices, valid)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate, now that the number of kept tokens is known: [batch, kv_heads, capacity, head_dim]."""
        batch, heads, kept, size = key_states.shape
        dropped = (self._announced or (kept,))[0] - kept
        capacity = self.max_cache_len - dropped // BUCKET * BUCKET
        self.capacity = capacity + -capacity % BUCKET
        self.device = key_states.device
        self.keys = key_states.new_zeros(batch, heads, self.capacity, size)
        self.values = value_states.new_zeros(batch, heads, self.capacity, value_states.shape[-1])
        self.used = torch.zeros(batch, self.capacity, dtype=torch.bool, device=self.device)
        self.filled = torch.zeros((), dtype=torch.long, device=self.device)
        self.cumulative_length = torch.zeros((), dtype=torch.long, device=self.device)
        if not torch.compiler.is_compiling():
            # What a compiled decode step changes in place keeps its address, as CUDA graphs need it.
            for tensor in (self.keys, self.values, self.used, self.filled, self.cumulative_length):
                torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def mask(self, config: Any, queries: Tensor, valid: Tensor | None) -> Tensor:
        """As `KeptTokensLayer.mask`, over the whole capacity.

        Raises:
            ValueError: If the attention implementation takes no 4-D mask.
        """
        implementation = config._attn_implementation
        if not takes_additive(config):
            raise ValueError(f"a static cache needs sdpa or eager attention, not {implementation}")
        new = self.filled + torch.arange(queries.shape[1], device=self.device)
        used = self.used.index_fill(1, new, True) if valid is None else self.used.index_copy(1, new, valid)
        slots = torch.arange(self.capacity, device=self.device)
        seen = (used[:, None] & (slots <= new[:, None])) | (slots == new[:, None])
        return (additive(seen, queries.dtype) if implementation == "eager" else seen)[:, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values of the kept tokens, [batch, kv_heads, kept, head_dim].

        Returns:
            At the first call what it was given, later the whole capacity.
        """
        first = not self.is_initialized
        kept = key_states.shape[-2]
        length, indices, valid = self._announced or (kept, None, None)
        kept = kept if indices is None else indices.shape[1]  # the rest fills up a fused layer's slots
        stored = key_states[:, :, :kept], value_states[:, :, :kept]
        if first:
            self.lazy_initialization(*stored)
        self._announced = None
        slots = self.filled + torch.arange(kept, device=self.device)
        self.keys.index_copy_(2, slots, stored[0])
        self.values.index_copy_(2, slots, stored[1])
        if valid is None:
            self.used.index_fill_(1, slots, True)
        else:
            self.used.index_copy_(1, slots, valid)
        self.filled.add_(kept)
        self.cumulative_length.add_(length)
        return (key_states, value_states) if first else (self.keys, self.values)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length of the keys that `update` returns, and their offset."""
        return (self.capacity if self.is_initialized else query_length), 0

    def crop(self, tokens_to_remove: int) -> None:
        """Not offered.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("a p-MoD model's static cache cannot be cropped; use a DynamicCache")

    def reset(self) -> None:
        """Empty it; the next prefill allocates anew."""
        self.keys = self.values = self.used = None  # type: ignore[assignment]
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch for beam search, in place."""
        for tensor in (self.keys, self.values, self.used):
            tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))


KeptTokens = KeptTokensLayer | StaticKeptTokensLayer
"""What a Mixture-of-Depths layer may find in a cache."""


def adopt_cache(cache: Cache, mod_layers: list[int], num_layers: int) -> None:
    """Let the layers of an empty cache hold kept tokens only, in place.

    Args:
        cache: What ``generate`` or the caller passes.
        mod_layers: Indices of the Mixture-of-Depths layers.
        num_layers: Number of decoder layers.

    Raises:
        ValueError: If the cache's layers have another storage (quantised, sliding window), which cannot hold a
            different number of tokens in each layer, or already hold tokens of another model.
    """
    while len(cache.layers) < num_layers and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    static = any(isinstance(cache.layers[index], StaticLayer) for index in mod_layers)
    for index in range(num_layers) if static else mod_layers:
        layer = cache.layers[index]
        if isinstance(layer, KeptTokensLayer | StaticKeptTokensLayer):
            continue
        if type(layer) not in (DynamicLayer, StaticLayer) or layer.is_initialized:
            raise ValueError(
                f"a p-MoD model keeps another number of tokens in each layer, which {type(layer).__name__} of "
                f"{type(cache).__name__} cannot hold; use a new DynamicCache (the default) or StaticCache"
            )
        cache.layers[index] = StaticKeptTokensLayer(layer.max_cache_len) if static else KeptTokensLayer()
