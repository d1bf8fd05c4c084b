"""Retention ratios for a budget: the known shapes, and one found from how much each layer's retention matters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

from pmod_cli.modeling.schedule import Ratios, constant, shifted_cosine, shifted_linear

Cost = Callable[[Sequence[float | None]], float]
"""What a schedule costs, as a share of the dense model's prefill FLOPs or KV cache."""

LEVELS = (None, 0.5, 0.25, 0.12, 0.06, 0.03)
"""Retention ratios that are tried in each layer."""

LEAST = 0.01
"""The smallest ratio in a schedule."""

_STEPS = 40


def shapes(layers: int, budget: float, cost: Cost) -> dict[str, Ratios]:
    """The known shapes at a budget, by name; one that cannot be as cheap is left out.

    ``paper`` is the paper's shifted cosine, ``linear`` the same with a straight line (their floor is 0.15 as in the
    paper, and lower where that is needed), ``constant`` one ratio in all layers but the first.
    """

    def decay(curve: Callable[..., Ratios], floor: float) -> Callable[[float], Ratios]:
        return lambda share: curve(layers, shift=1.5 * share - 0.5, floor=floor)

    families: dict[str, Sequence[Callable[[float], Ratios]]] = {
        "paper": [decay(shifted_cosine, floor) for floor in (0.15, 0.05, LEAST)],
        "linear": [decay(shifted_linear, floor) for floor in (0.15, 0.05, LEAST)],
        "constant": [
            lambda share, first=first: constant(  # type: ignore[misc]
                layers, ratio=max(share, LEAST), first_layer=first, last_layer=layers - 1
            )
            for first in (1, 0)
        ],
    }
    found = {}
    for name, family in families.items():
        for shape in family:
            ratios = _dearest(shape, budget, cost)
            if ratios is not None:
                found[name] = ratios
                break
    return found


def scaled(ratios: Sequence[float | None], budget: float, cost: Cost) -> Ratios | None:
    """A schedule's ratios times one factor, such that it costs the budget; None if its dense layers cost more."""
    routed = [ratio for ratio in ratios if ratio]
    if not routed:
        return None
    most = 1 / min(routed)

    def shape(share: float) -> Ratios:
        return [None if ratio is None else min(max(ratio * most * share, LEAST), 1.0) for ratio in ratios]

    return _dearest(shape, budget, cost)


def search(
    background: Ratios,
    budget: float,
    cost: Cost,
    divergence: Callable[[Ratios], float],
) -> Ratios:
    """Find ratios for a budget from one measurement for each layer and level.

    Each layer in turn gets each of `LEVELS`, the others staying as in a background schedule of about the same cost;
    the sum of the changes in divergence, as if layers did not depend on each other, is then least at the budget
    (by Lagrange: every layer takes the level that is best at one price of cost).

    Args:
        background: A schedule at the budget.
        budget: See `Cost`.
        cost: The cost of a schedule; layers' costs add up.
        divergence: What a schedule loses.
    """
    layers = range(len(background))

    def changed(layer: int, level: float | None) -> Ratios:
        return [*background[:layer], level, *background[layer + 1 :]]

    loss = {(layer, level): divergence(changed(layer, level)) for layer, level in product(layers, LEVELS)}
    price = {(layer, level): cost(changed(layer, level)) for layer, level in product(layers, LEVELS)}

    def best(share: float) -> Ratios:
        # From the cheapest of all levels to the least loss, as the price of cost falls.
        weight = 10.0 ** (8 - 16 * share)
        return [
            min(LEVELS, key=lambda level: loss[layer, level] + weight * price[layer, level])
            for layer in layers
        ]

    found = _dearest(best, budget, cost) or list(background)
    return scaled(found, budget, cost) or found


def _dearest(shape: Callable[[float], Ratios], budget: float, cost: Cost) -> Ratios | None:
    """Of schedules that cost more the larger the share (0 to 1), the one nearest below the budget; None if none is."""
    if cost(shape(0.0)) > budget:
        return None
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if cost(shape(middle)) > budget:
            high = middle
        else:
            low = middle
    return shape(low)
