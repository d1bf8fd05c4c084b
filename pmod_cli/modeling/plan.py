"""What one forward pass knows of its tokens, shared by all its Mixture-of-Depths layers.

The number of routed and of real tokens in each sample has to be known on the host, since it decides tensor
shapes. It is read once a forward pass, in one transfer; no layer asks the device again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pmod_cli.modeling.router import GOLDEN_STEP, coverage_term, random_rank, spread_rank
from pmod_cli.modeling.schedule import kept_tokens

_ABOVE_LOGITS = 1e30
"""One step of a random order; beside it every logit is nothing in fp32."""


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


class RoutingRecord:
    """Where the layers of one forward pass leave their routing.

    No dict and no dataclass: sharded training (FSDP2) and accelerate's hooks copy those among a module's arguments,
    and what a layer writes into a copy is lost.
    """

    def __init__(self) -> None:
        self._layers: dict[int, LayerRouting] = {}

    def __setitem__(self, layer: int, routing: LayerRouting) -> None:
        self._layers[layer] = routing

    def get(self, layer: int) -> LayerRouting | None:
        """A layer's routing; None for a dense layer and for a pass without routed tokens."""
        return self._layers.get(layer)


@dataclass
class RoutingPlan:
    """Tokens of one forward pass (a prefill, or a chunk that continues a cache).

    Attributes:
        target_mask: True for routed tokens, [batch, tokens]; None if there are none in the whole batch, and
            every layer then runs dense.
        real_mask: False for padding, [batch, tokens]; None if nothing is padded.
        kept_lengths: For each decoder layer how many tokens each sample keeps, text included; None for a dense
            layer. Found here and not in the layers, so that a compiled layer sees plain numbers.
        rank: Tie-break, int64 [layers, batch, tokens]; None if there are no routed tokens.
        record: Where Mixture-of-Depths layers leave their routing, if the caller wants it.
        num_real: Real tokens of each sample.
        fused: Whether layers may use the fused kernels.
        device_lengths: ``kept_lengths`` on the device, int32 [layers, batch]; None where nobody needs them: every
            sample of each layer keeps as many tokens, and there are no fused kernels.
        coverage: What is added to the logits for ranking, fp32 [layers, batch, tokens]; None for nothing.
    """

    target_mask: Tensor | None
    real_mask: Tensor | None
    kept_lengths: Sequence[list[int] | None] = ()
    rank: Tensor | None = None
    record: RoutingRecord | None = None
    num_real: Sequence[int] = ()
    fused: bool = False
    device_lengths: Tensor | None = None
    coverage: Tensor | None = None

    def routes(self, layer: int) -> bool:
        """Whether there are routed tokens and the layer is none that runs dense."""
        return self.target_mask is not None and self.kept_lengths[layer] is not None

    def drops_nothing(self, layer: int) -> bool:
        """Whether a Mixture-of-Depths layer keeps every real token; their order then stays the dense model's."""
        return self.kept_lengths[layer] == self.num_real

    def draw(self) -> None:
        """Let chance choose the tokens that each layer keeps, whatever the logits."""
        if self.rank is not None:
            self.rank = random_rank(self.rank.shape).to(self.rank.device)
            self.coverage = self.rank.float() * -_ABOVE_LOGITS

    @classmethod
    def from_counts(
        cls,
        target_mask: Tensor | None,
        real_mask: Tensor | None,
        num_targets: list[int],
        num_real: list[int],
        ratios: Sequence[float | None],
        record: RoutingRecord | None = None,
        fused: bool = False,
        coverage: Sequence[float] = (),
        step: int = GOLDEN_STEP,
    ) -> RoutingPlan:
        """A plan from counts that the host already has; nothing is read from the device.

        ``num_targets`` and ``num_real`` are each sample's in the two masks, ``ratios`` the retention ratios of the
        decoder layers, None for a dense one; ``coverage`` are their strengths, none of them if empty;
        ``step`` see `spread_rank`.
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
        uneven = any(min(layer) < max(layer) for layer in lengths if layer is not None)
        routed = any(layer is not None for layer in lengths)
        on_device = _to_device(lengths, target_mask.device) if routed and (fused or uneven) else None
        rank = spread_rank(target_mask, len(ratios), step)
        term = coverage_term(rank, _upload(coverage, torch.float32, rank.device)) if any(coverage) else None
        return cls(target_mask, real_mask, lengths, rank, record, num_real, fused, on_device, term)


def plan_forward(
    shape: tuple[int, int],
    vision_mask: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    ratios: Sequence[float | None],
    target_tokens: str,
    record: RoutingRecord | None = None,
    fused: bool = False,
    coverage: Sequence[float] = (),
    step: int = GOLDEN_STEP,
) -> tuple[RoutingPlan | None, Tensor | None]:
    """Count the tokens of a forward pass and plan it; the one time that the host waits for the device.

    Args:
        shape: (batch, tokens).
        vision_mask: True for vision tokens, [batch, tokens], or None.
        attention_mask: 1 for real tokens, [batch, past + tokens]; None if nothing is padded.
        position_ids: As the caller gave them, or None.
        ratios: Retention ratio of each decoder layer, None for a dense one.
        target_tokens: See `MoDConfig`; what ``vision_hr`` leaves out is not in ``vision_mask``.
        record: Where layers put their routing, or None.
        fused: Whether layers may use the fused kernels.
        coverage: Strength of coverage in each decoder layer; none of them if empty.
        step: See `spread_rank`.

    Returns:
        The plan, None if nothing is routed or padded; and the attention mask as booleans, None if it hides nothing.

    Raises:
        ValueError: If several sequences with vision tokens are packed into one, or the family makes a mask of its own.
    """
    batch, length = shape
    if attention_mask is not None and getattr(attention_mask, "ndim", 0) != 2:
        raise ValueError(
            "the model hands its decoder an attention mask of its own, e.g. for pictures whose tokens see one another "
            "both ways; a p-MoD layer's attention is causal"
        )
    whole_mask = None if attention_mask is None else attention_mask.bool()
    real_mask = None if whole_mask is None else whole_mask[:, -length:]
    restarts = None if vision_mask is None or whole_mask is not None else _restarts(position_ids, batch)
    vision, real, whole, packed = count_tokens(vision_mask, real_mask, whole_mask, restarts)
    if whole_mask is None or whole == [whole_mask.shape[1]] * batch:
        whole_mask = None
    if whole_mask is None or real == [length] * batch:
        real_mask, real = None, [length] * batch
    if vision_mask is None or not any(vision):
        return (None if real_mask is None else RoutingPlan(None, real_mask)), whole_mask
    if any(packed):
        raise ValueError(
            "position_ids start anew within a sequence: several sequences packed into one are not supported, "
            "since a layer keeps a share of each sequence's vision tokens; pad them into a batch"
        )
    if target_tokens == "all":
        # A sample without vision tokens stays dense, as it is alone.
        vision_mask = vision_mask.any(-1, keepdim=True).expand_as(vision_mask)
        vision_mask = vision_mask if real_mask is None else vision_mask & real_mask
        vision = [tokens if seen else 0 for tokens, seen in zip(real, vision, strict=True)]
    plan = RoutingPlan.from_counts(
        vision_mask, real_mask, vision, real, ratios, record, fused, coverage, step
    )
    return plan, whole_mask


def _restarts(position_ids: Tensor | None, batch: int) -> Tensor | None:
    """True where positions fall within a sequence, [batch, tokens - 1], as in packed sequences; None if not known.

    Positions are [1 or batch, tokens], or for M-RoPE [4, batch, tokens] with the text's own first. Those of the
    picture alone, [3, batch, tokens], fall within a picture too.
    """
    if position_ids is not None and position_ids.dim() == 3:
        position_ids = position_ids[0] if position_ids.shape[0] == 4 else None
    if position_ids is None or position_ids.shape[-1] < 2:
        return None
    return (position_ids[..., 1:] < position_ids[..., :-1]).expand(batch, -1)


def count_tokens(*masks: Tensor | None) -> list[list[int]]:
    """How many entries are True in each sample of each mask, read from the device in one transfer.

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


def _to_device(lengths: Sequence[list[int] | None], device: torch.device) -> Tensor:
    """Tokens that each layer keeps of each sample, int32 [layers, batch]."""
    batch = next(len(layer) for layer in lengths if layer is not None)
    # Rows of 16 bytes: Triton compiles a kernel anew for a pointer that is not aligned to them.
    rows = [(layer or [0] * batch) + [0] * (-batch % 4) for layer in lengths]
    return _upload(rows, torch.int32, device)[:, :batch]


def _upload(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers on the device, without a wait of the host."""
    table = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True)
