"""What chooses the tokens that a layer keeps: fitted routers, and the controls that they are held against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from pmod_cli.calibration.fit import Fitted
from pmod_cli.calibration.routable import Rank, Ratios, Routable
from pmod_cli.modeling.plan import RoutingPlan
from pmod_cli.modeling.router import random_rank

DRAWS = 3
"""How often chance is drawn: one draw can be lucky."""


@dataclass(frozen=True)
class Selection:
    """One way to choose.

    Attributes:
        name: What tables call it.
        routers: By layer; in others the router is zero, and all its tokens tie.
        coverage: Strength of coverage, for all layers or for each.
        rank: Another tie-break.
        draws: How often it is drawn; outcomes are means over the draws.
    """

    name: str
    routers: Mapping[int, tuple[torch.Tensor, torch.Tensor | None]] = field(default_factory=dict)
    coverage: float | Sequence[float] = 0.0
    rank: Rank | None = None
    draws: int = 1

    @contextmanager
    def on(self, routable: Routable, ratios: Ratios) -> Iterator[Any]:
        """The model with these ratios and this selection while the block runs."""
        for index, router in enumerate(routable.routers):
            with torch.no_grad():
                router.reset_parameters()
                if index in self.routers:
                    weight, bias = self.routers[index]
                    router.weight.copy_(weight.view_as(router.weight))
                    if router.bias is not None and bias is not None:
                        router.bias.copy_(bias.view_as(router.bias))
        with routable.routed(ratios, self.coverage, self.rank) as model:
            yield model


def _same_spread(plan: RoutingPlan) -> None:
    assert plan.rank is not None
    plan.rank = plan.rank[:1].expand_as(plan.rank)


def _random(seed: int) -> Rank:
    generator = torch.Generator().manual_seed(seed)

    def rank(plan: RoutingPlan) -> None:
        assert plan.rank is not None
        plan.rank = random_rank(plan.rank.shape, generator).to(plan.rank.device)

    return rank


def controls(seed: int = 0) -> list[Selection]:
    """The selections that look at no token: the same spread in all layers, one shifted from layer to layer, random."""
    return [
        Selection("same spread", rank=_same_spread),
        Selection("shifted spread"),
        Selection("random", rank=_random(seed), draws=DRAWS),
    ]


def fitted(routers: Mapping[int, Fitted], strength: float, scale: float) -> Selection:
    """Fitted routers with coverage.

    Args:
        routers: By layer.
        strength: Of coverage, in standard deviations of the fitted logit.
        scale: Standard deviation of the logits, small so that weights stay near 1.
    """
    tensors: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {
        layer: (router.weight * scale, router.bias * scale) for layer, router in routers.items()
    }
    return Selection(f"fitted, coverage {strength:g}", tensors, strength * scale)
