"""Standard errors and paired intervals, against formulas and against brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmod_cli.evaluation import stats
from pmod_cli.evaluation.stats import Stratum


def mean_of(values, weight=100.0):
    return {"": Stratum(weight, {index: (float(value), 1.0) for index, value in enumerate(values)})}


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(1, 100))
def test_the_score_is_the_weighted_mean(values, weight):
    assert stats.score(mean_of(values, weight)) == pytest.approx(weight * sum(values) / len(values))


def test_the_standard_error_is_that_of_a_share():
    values = [1] * 300 + [0] * 700
    assert stats.standard_error(mean_of(values)) == pytest.approx(100 * math.sqrt(0.3 * 0.7 / 1000), rel=0.03)


def test_the_standard_error_of_a_sum_over_strata():
    rng = np.random.default_rng(0)
    strata = {
        name: Stratum(1.0, {i: (float(v), 1.0) for i, v in enumerate(rng.normal(100, spread, 200))})
        for name, spread in (("a", 5), ("b", 50))
    }
    expected = math.sqrt(
        sum(np.var([n for n, _ in s.units.values()]) / len(s.units) for s in strata.values())
    )
    assert stats.standard_error(strata) == pytest.approx(expected, rel=0.03)


def test_drawing_kinds_is_drawing_units():
    """The multinomial shortcut against resampling one by one, for a ratio whose denominators differ."""
    rng = np.random.default_rng(1)
    truth, said = rng.random(400) < 0.5, rng.random(400) < 0.6
    units = {
        i: (2.0 * (t and s), float(t) + float(s)) for i, (t, s) in enumerate(zip(truth, said, strict=True))
    }
    rows = np.array(list(units.values()))
    drawn = rows[rng.integers(0, 400, size=(4000, 400))].sum(1)
    assert stats.standard_error({"": Stratum(100.0, units)}) == pytest.approx(
        float(np.std(100 * drawn[:, 0] / drawn[:, 1])), rel=0.05
    )


def test_the_paired_interval_is_narrower_than_an_unpaired_one():
    rng = np.random.default_rng(2)
    baseline = (rng.random(1000) < 0.6).astype(float)
    model = baseline.copy()
    model[rng.choice(1000, 20, replace=False)] = 0.0  # a few answers lost
    found = stats.difference(mean_of(model), mean_of(baseline))
    lost = 100 * (model.mean() - baseline.mean())
    assert found.points == pytest.approx(lost)
    assert found.low < lost < found.high < 0
    assert found.significant
    unpaired = (
        2 * 1.96 * math.hypot(stats.standard_error(mean_of(model)), stats.standard_error(mean_of(baseline)))
    )
    assert found.high - found.low < unpaired / 3


def test_no_difference_is_not_significant():
    values = [1.0, 0.0] * 50
    found = stats.difference(mean_of(values), mean_of(values))
    assert (found.points, found.low, found.high) == (0, 0, 0)
    assert not found.significant


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        shared = rng.random(300)
        first, second = (
            (shared < 0.6).astype(float),
            (0.8 * shared + 0.2 * rng.random(300) < 0.55).astype(float),
        )
        truth = 100 * (0.6 - 0.55)  # P(0.8 U + 0.2 V < 0.55) = 0.55 + ..., see below
        found = stats.difference(mean_of(first), mean_of(second), resamples=500)
        exact = 100 * (0.6 - _below(0.55))
        assert abs(exact - truth) < 10
        covered += found.low <= exact <= found.high
    assert 0.90 <= covered / 200 <= 0.99


def _below(limit):
    """P(0.8 U + 0.2 V < limit) for independent uniforms, 0.2 <= limit <= 0.8."""
    return (limit - 0.1) / 0.8


def test_only_shared_units_are_compared():
    model = {"": Stratum(100.0, {1: (1.0, 1.0), 2: (1.0, 1.0), 3: (0.0, 1.0)})}
    baseline = {"": Stratum(100.0, {1: (0.0, 1.0), 2: (1.0, 1.0), 4: (1.0, 1.0)})}
    assert stats.difference(model, baseline).points == pytest.approx(50.0)


def test_too_few_units_have_no_error():
    assert stats.standard_error(mean_of([1.0])) is None
    assert stats.difference(mean_of([1.0]), mean_of([0.0])) is None


def test_a_ratio_without_denominator_is_zero():
    assert stats.score({"": Stratum(100.0, {0: (0.0, 0.0)})}) == 0.0
