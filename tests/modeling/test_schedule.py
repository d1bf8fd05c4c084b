from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmod_cli.modeling import schedule
from tests.common.reference import REFERENCE

ENTRIES = json.loads((REFERENCE / "schedule.json").read_text())


def ours(name: str, layers: int, factor: float) -> schedule.Ratios:
    if name.startswith("shifted"):
        kind, _, ceiling, floor = name.split("_")
        function = schedule.shifted_cosine if kind == "shiftedcos" else schedule.shifted_linear
        return function(layers, shift=factor, ceiling=float(ceiling), floor=float(floor))
    if name == "interleave":
        return schedule.interleaved(layers, ratio=factor)
    last = layers - 1 if name == "deep_all_include_last" else None
    return schedule.constant(layers, ratio=factor, last_layer=last)


@pytest.mark.parametrize(
    "entry",
    # At 24 layers the release still divides by 31 in its decaying schedules, which is no schedule for 24 layers.
    [
        e
        for e in ENTRIES["entries"]
        if e["num_hidden_layers"] == 32 or "shifted" not in e["mod_target_layers"]
    ],
    ids=lambda e: f"{e['mod_target_layers']}-{e['mod_router_factor']}-{e['num_hidden_layers']}",
)
def test_schedule_is_the_released_one(entry):
    ratios = ours(entry["mod_target_layers"], entry["num_hidden_layers"], entry["mod_router_factor"])
    assert ratios == pytest.approx(entry["ratio_per_layer"], abs=1e-12)
    kept = [576 if ratio is None else schedule.kept_tokens(576, ratio) for ratio in ratios]
    assert kept == [576 if k is None else k for k in entry["kept_of_576_per_layer"]]
    assert sum(kept) / 576 / len(kept) == pytest.approx(entry["mean_kept_fraction"], abs=1e-9)


def test_paper_kv_cache():
    assert schedule.mean_retention(schedule.shifted_cosine(32)) == pytest.approx(0.5375, abs=5e-4)


def test_kept_tokens_multiplies_in_single_precision():
    # The one case up to 4096 tokens of the main schedule where a double product truncates otherwise.
    ratio = schedule.shifted_cosine(32)[10]
    assert ratio is not None
    assert schedule.kept_tokens(2365, ratio) == 1808
    assert int(2365 * ratio) == 1807
    for count, tenth, single, double in ENTRIES["trunc_fp32_vs_double"]:
        assert schedule.kept_tokens(count, tenth) == single
        assert int(count * tenth) == double


@given(layers=st.integers(2, 80), shift=st.floats(0, 1), ceiling=st.floats(0.5, 1), floor=st.floats(0, 0.5))
def test_decay_never_rises_and_stays_in_range(layers, shift, ceiling, floor):
    for function in (schedule.shifted_cosine, schedule.shifted_linear):
        ratios = function(layers, shift=shift, ceiling=ceiling, floor=floor)
        filled = [2.0 if ratio is None else ratio for ratio in ratios]
        assert len(ratios) == layers
        assert filled == sorted(filled, reverse=True)
        assert all(ratio is None or floor <= ratio <= ceiling for ratio in ratios)


@given(count=st.integers(0, 5000), ratio=st.floats(0, 1))
def test_kept_tokens_is_between_none_and_all(count, ratio):
    assert 0 <= schedule.kept_tokens(count, ratio) <= count


def test_too_few_layers_and_wrong_list():
    with pytest.raises(ValueError, match="at least 2"):
        schedule.shifted_cosine(1)
    with pytest.raises(ValueError, match="3 retention ratios for 4"):
        schedule.explicit(4, ratios=[None, 0.5, 0.5])
