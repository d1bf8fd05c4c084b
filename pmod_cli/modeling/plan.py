"""What one forward pass knows of its tokens, shared by all its Mixture-of-Depths layers.

The number of routed and of real tokens in each sample has to be known on the host, since it decides tensor
shapes. It is read once a forward pass, in one transfer; no layer asks the device again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pmod_cli.modeling.router import spread_rank
from pmod_cli.modeling.schedule import kept_tokens


@dataclass
class LayerRouting:
    """What ``output_routing=True`` returns for one Mixture-of-Depths layer.

    Attributes:
        logits: Raw router logits, fp32 [batch, tokens].
        weights: Normalised weights, 1 for tokens that are not routed, [batch, tokens].
        kept: True for the tokens that the layer processed, text included, [batch, tokens].
        indices: The same as positions, ascending, [batch, longest]; where ``kept_slots`` is False a sample has
            fewer and the index means nothing.
        kept_slots: [batch, longest], or None if every sample kept as many.
    """

    logits: Tensor
    weights: Tensor
    kept: Tensor
    indices: Tensor
    kept_slots: Tensor | None


@dataclass
class RoutingPlan:
    """Tokens of one forward pass (a prefill, or a chunk that continues a cache).

    Attributes:
        target_mask: True for routed tokens, [batch, tokens]; None if there are none in the whole batch, and
            every layer then runs dense.
        real_mask: False for padding, [batch, tokens]; None if nothing is padded.
        kept_lengths: For each decoder layer how many tokens each sample keeps, text included; None for a dense
            layer. Found here and not in the layers, so that a compiled layer sees plain numbers.
        rank: Tie-break, int64 [batch, tokens]; None if there are no routed tokens.
        record: Filled with one `LayerRouting` a Mixture-of-Depths layer when the caller wants them.
    """

    target_mask: Tensor | None
    real_mask: Tensor | None
    kept_lengths: Sequence[list[int] | None] = ()
    rank: Tensor | None = None
    record: dict[int, LayerRouting] | None = None

    @classmethod
    def from_counts(
        cls,
        target_mask: Tensor | None,
        real_mask: Tensor | None,
        num_targets: list[int],
        num_real: list[int],
        ratios: Sequence[float | None],
        record: dict[int, LayerRouting] | None = None,
    ) -> RoutingPlan:
        """A plan from counts that the host already has; nothing is read from the device.

        Args:
            target_mask: True for routed tokens, [batch, tokens], or None.
            real_mask: False for padding, [batch, tokens], or None.
            num_targets: Routed tokens of each sample, as counted in ``target_mask``.
            num_real: Real tokens of each sample, as counted in ``real_mask``.
            ratios: Retention ratio of each decoder layer, None for a dense one.
            record: Where layers put their routing, or None.
        """
        if target_mask is None or not any(num_targets):
            return cls(None, real_mask, record=record)
        samples = list(zip(num_real, num_targets, strict=True))
        lengths = [
            None
            if ratio is None
            else [real - routed + kept_tokens(routed, ratio) for real, routed in samples]
            for ratio in ratios
        ]
        return cls(target_mask, real_mask, lengths, spread_rank(target_mask), record)


def count_tokens(*masks: Tensor | None) -> list[list[int]]:
    """Number of True a sample in each mask, read from the device in one transfer.

    Args:
        masks: [batch, tokens] each, or None.

    Returns:
        For each mask a list of ``batch`` numbers; an empty list for None.
    """
    present = [mask.sum(-1) for mask in masks if mask is not None]
    if not present:
        return [[] for _ in masks]
    counts = iter(torch.stack(present).tolist())
    return [[] if mask is None else next(counts) for mask in masks]
