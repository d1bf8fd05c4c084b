"""The KV cache of a Mixture-of-Depths layer: it holds the kept tokens and nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from pmod_cli.modeling.masks import join_valid


class KeptTokensLayer(DynamicLayer):
    """One layer's keys and values, [batch, kv_heads, kept tokens, head_dim], in a `DynamicCache`.

    Its *sequence length* is that of the whole sequence, dropped tokens included, so that positions may be read
    from any layer; its *slots* are the tokens stored. Samples that kept fewer tokens than the batch's longest
    leave slots unused; ``valid`` tells which.

    Attributes:
        length: Tokens seen, kept or not.
        valid: False for unused slots, [batch, slots]; None if every slot is in use.
        positions: Index in the sequence of the slots up to the last routed chunk, [batch, slots]. The slots
            behind them, one a token, are the end of the sequence.
    """

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._clear()

    def _clear(self) -> None:
        self.length = 0
        self.valid: Tensor | None = None
        self.positions: Tensor | None = None
        self._announced: tuple[int, Tensor | None, Tensor | None] | None = None

    @property
    def slots(self) -> int:
        """Number of tokens stored for the sample that has most."""
        return self.keys.shape[-2] if self.is_initialized and self.keys.dim() > 1 else 0

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
        """Append keys and values of the kept tokens, [batch, kv_heads, kept, head_dim]; return all of them."""
        batch, _, new, _ = key_states.shape
        length, indices, valid = self._announced or (new, None, None)
        self._announced = None
        self.valid = join_valid(self.valid, valid, batch, self.slots, new, key_states.device)
        if indices is not None:
            self.positions = torch.cat([self._all_positions(batch, indices), indices + self.length], dim=-1)
        self.length += length
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
            self.valid = None if bool(inside.all()) else inside
        elif self.valid is not None:
            self.valid = self.valid[:, :remaining]
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
        self.valid = None if self.valid is None else function(self.valid)
        self.positions = None if self.positions is None else function(self.positions)

    def _all_positions(self, batch: int, like: Tensor) -> Tensor:
        """Sequence index of every slot, [batch, slots]."""
        routed = 0 if self.positions is None else self.positions.shape[-1]
        tail = torch.arange(self.length - (self.slots - routed), self.length, device=like.device)
        tail = tail.expand(batch, -1)
        return tail if self.positions is None else torch.cat([self.positions, tail], dim=-1)


def adopt_cache(cache: Cache, mod_layers: list[int], num_layers: int) -> None:
    """Let the Mixture-of-Depths layers of an empty `DynamicCache` hold kept tokens only, in place.

    Args:
        cache: What ``generate`` or the caller passes.
        mod_layers: Indices of the Mixture-of-Depths layers.
        num_layers: Number of decoder layers.

    Raises:
        ValueError: If the cache's layers have a fixed size or another storage (static, quantised, sliding
            window), which cannot hold a different number of tokens in each layer.
    """
    while len(cache.layers) < num_layers and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    for index in mod_layers:
        layer = cache.layers[index]
        if isinstance(layer, KeptTokensLayer):
            continue
        if type(layer) is not DynamicLayer or layer.get_seq_length():
            raise ValueError(
                f"a p-MoD model keeps another number of tokens in each layer, which {type(layer).__name__} of "
                f"{type(cache).__name__} cannot hold; use a new DynamicCache (the default)"
            )
        cache.layers[index] = KeptTokensLayer()
