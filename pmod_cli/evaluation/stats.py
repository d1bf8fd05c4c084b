"""How sure a score is: bootstrap over the samples, and paired for the difference between two models.

A score here is a weighted sum of ratios, ``sum_s weight_s * sum(numerator) / sum(denominator)``, with one stratum
``s`` for most tasks (a mean is a ratio whose denominators are 1), one per category for MME and one per part for POPE,
whose F1 is such a ratio too. That covers the paper's 14 tasks exactly, so one bootstrap serves them all.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
SEED = 0

Ratio = tuple[float, float]
"""What one unit (a sample, or a group of them that only counts together) adds: numerator and denominator."""


class Stratum(NamedTuple):
    """Units that are resampled among themselves; their ratio is multiplied with ``weight`` in the score."""

    weight: float
    units: Mapping[Hashable, Ratio]


Strata = Mapping[str, Stratum]


class Difference(NamedTuple):
    """A model's score less the baseline's, in points, with the 95 % interval of a paired bootstrap."""

    points: float
    low: float
    high: float

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def score(strata: Strata) -> float:
    """The score itself."""
    total = 0.0
    for weight, units in strata.values():
        numerator, denominator = (sum(unit[side] for unit in units.values()) for side in (0, 1))
        total += weight * numerator / denominator if denominator else 0.0
    return total


def standard_error(strata: Strata, resamples: int = RESAMPLES) -> float | None:
    """Bootstrap standard error of the score; None if there are no two units to draw from."""
    if max((len(stratum.units) for stratum in strata.values()), default=0) < 2:
        return None
    return float(np.std(_resample([strata], resamples)[0], ddof=1))


def difference(model: Strata, baseline: Strata, resamples: int = RESAMPLES) -> Difference | None:
    """Compare two models on the units that both have, drawing the same units for both; None if there are no two."""
    ours, theirs = _shared(model, baseline), _shared(baseline, model)
    if max((len(stratum.units) for stratum in ours.values()), default=0) < 2:
        return None
    drawn = _resample([ours, theirs], resamples)
    low, high = np.percentile(drawn[0] - drawn[1], [2.5, 97.5])
    return Difference(score(ours) - score(theirs), float(low), float(high))


def compare_means(groups: Sequence[Hashable], values: Iterable[float], others: Iterable[float]) -> Difference:
    """Mean of the values less that of others of the same samples; samples of a group (a picture) are drawn together.

    Args:
        groups: Each sample's; two different ones at least.
        values: By sample.
        others: By sample.
    """
    found = difference(_grouped(groups, values), _grouped(groups, others))
    assert found is not None
    return found


def _grouped(groups: Sequence[Hashable], values: Iterable[float]) -> Strata:
    units: dict[Hashable, Ratio] = {}
    for group, value in zip(groups, values, strict=True):
        total, count = units.get(group, (0.0, 0.0))
        units[group] = (total + value, count + 1)
    return {"": Stratum(1.0, units)}


def _shared(strata: Strata, other: Strata) -> Strata:
    """Those units of the strata that the other has too."""
    return {
        name: Stratum(weight, {key: units[key] for key in units if key in other[name].units})
        for name, (weight, units) in strata.items()
        if name in other
    }


def _resample(sides: Sequence[Strata], resamples: int) -> np.ndarray:
    """Scores of bootstrap resamples: [sides, resamples]."""
    generator = np.random.default_rng(SEED)
    totals = np.zeros((len(sides), resamples))
    for name in sorted(sides[0]):
        strata = [side[name] for side in sides]
        rows = np.array([sum((stratum.units[key] for stratum in strata), ()) for key in strata[0].units])
        if not len(rows):
            continue
        # Units with the same contribution are exchangeable: drawing how often each kind comes up is the same as
        # drawing the units one by one, and much cheaper.
        kinds, counts = np.unique(rows, axis=0, return_counts=True)
        drawn = generator.multinomial(len(rows), counts / len(rows), size=resamples) @ kinds
        for side, stratum in enumerate(strata):
            numerator, denominator = drawn[:, 2 * side], drawn[:, 2 * side + 1]
            ratio = np.divide(numerator, denominator, out=np.zeros(resamples), where=denominator != 0)
            totals[side] += stratum.weight * ratio
    return totals
