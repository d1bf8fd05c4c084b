"""The whole chain, small: every step through the public commands, what is finished is reused."""

from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image

from pmod_cli.cli import main
from pmod_cli.demo import commands, tight
from pmod_cli.modeling.schedule import kept_tokens, shifted_cosine
from tests.common.small_demo import ARGUMENTS


@pytest.fixture(scope="module")
def report(demo_folder):
    return json.loads((demo_folder / "report.json").read_text())


def test_every_model_has_a_row(report):
    assert [row["model"] for row in report["rows"]] == [
        "baseline",
        "baseline, images shuffled",
        "dense, fine-tuned (control)",
        "p-MoD, before fine-tuning",
        "p-MoD, fine-tuned",
    ]
    accuracy = {row["model"]: row["accuracy"]["exact_match"] for row in report["rows"]}
    assert accuracy["baseline"] >= 90
    assert accuracy["baseline, images shuffled"] <= 60
    assert {"colour", "shape", "place", "exists", "count"} == set(report["kinds"])


def test_costs_are_the_schedules(report):
    ratios = shifted_cosine(8)
    kept = [100 if ratio is None else kept_tokens(100, ratio) for ratio in ratios]
    assert report["retention"]["scheduled"] == kept
    assert report["retention"]["ratios"] == ratios
    rows = {row["model"]: row for row in report["rows"]}
    pmod, dense = rows["p-MoD, fine-tuned"], rows["dense, fine-tuned (control)"]
    # Keys and values, fp32, width 96: what the caches of both models really held differs by the dropped tokens.
    assert dense["kv_bytes"] - pmod["kv_bytes"] == sum(100 - number for number in kept) * 2 * 96 * 4
    assert pmod["prefill_flops"] < 0.75 * dense["prefill_flops"]
    target = next(target for target in report["targets"] if target["name"].startswith("mean vision-token"))
    assert target["met"]


def test_few_tokens_are_chosen_in_each_way(report, demo_folder):
    assert [budget["name"] for budget in report["tight"]] == ["keep8", "keep2"]
    for budget in report["tight"]:
        rows = {row["model"]: row for row in budget["rows"]}
        assert list(rows) == [arm.label for arm in tight.ARMS.values()]
        # Calibrated on 40 questions, without training; the fine-tuning of two steps says nothing.
        assert rows["calibrated"]["accuracy"]["points"] > rows["random tokens"]["accuracy"]["points"]
        for row in rows.values():
            for found in filter(None, (row["accuracy"], row["over_random"], row["over_dense"])):
                assert found["low"] <= found["points"] <= found["high"]
        behind = rows["calibrated"]["accuracy"]["points"] - rows["random tokens"]["accuracy"]["points"]
        assert rows["calibrated"]["over_random"]["points"] == pytest.approx(behind)
        assert rows["random tokens"]["over_random"] is None
        assert 0.45 < budget["flops"] < 0.6
        for folder in tight.ARMS:
            config = json.loads(
                (demo_folder / "models" / f"{budget['name']}-{folder}" / "config.json").read_text()
            )
            assert config["mod"]["retention_ratios"] == budget["ratios"]
            assert config["mod"]["choice"] == ("random" if "random" in folder else "router")
    assert len([target for target in report["targets"] if "calibrated, keep8" in target["name"]]) == 2


def test_pictures_and_pages_exist(report):
    for name, path in report["files"].items():
        if path.endswith(".png"):
            with Image.open(path) as image:
                assert min(image.size) > 300, name


def test_a_second_run_reuses_and_repeats_what_is_lost(demo_folder, tmp_path, capsys):
    # A copy has other paths, so its commands would run anew: move the run's steps along in place instead.
    steps = demo_folder / "steps"
    before = {path.name: path.stat().st_mtime_ns for path in steps.iterdir()}
    saved = tmp_path / "steps"
    shutil.copytree(steps, saved)
    (steps / "visualize.json").unlink()
    with pytest.raises(SystemExit) as exit_code:
        main(["demo", "--output", str(demo_folder), *ARGUMENTS, "--json"])
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["command"] == "demo"
    missed = [target for target in document["result"]["targets"] if not target["met"]]
    assert exit_code.value.code == (1 if missed else None)
    after = {path.name: path.stat().st_mtime_ns for path in steps.iterdir()}
    assert {name for name in before if after[name] != before[name]} == {"visualize.json"}
    assert err.count("finished before, reused") == len(before) - 1
    assert (
        json.loads((steps / "visualize.json").read_text())["result"]
        == json.loads((saved / "visualize.json").read_text())["result"]
    )


def test_a_missed_target_exits_1(demo_folder, capsys, monkeypatch):
    monkeypatch.setattr("pmod_cli.demo.summary.GUESSING_MARGIN", -100.0)
    with pytest.raises(SystemExit) as exit_code:
        main(["demo", "--output", str(demo_folder), *ARGUMENTS])
    assert exit_code.value.code == 1
    out, err = capsys.readouterr()
    assert "missed  baseline with shuffled pictures" in out
    assert err.strip().splitlines()[-1].startswith("error: missed: baseline with shuffled pictures")


def test_an_evaluation_of_another_model_takes_its_place(demo_folder, tmp_path):
    """As after a run with other settings."""
    place = shutil.copytree(demo_folder / "eval" / "eval-dense", tmp_path / "eval-dense")
    evaluated = commands.evaluate(
        demo_folder / "models" / "pmod", "pmod_demo", demo_folder / "tasks", place, lambda *_: None
    )
    assert evaluated.action()["model"]["source"].endswith("pmod")
