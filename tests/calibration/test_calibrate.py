"""The whole of ``pmod calibrate`` on the demo's baseline, at a budget where the choice of tokens matters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pmod_cli.calibration import bench
from pmod_cli.calibration.bench import Bench, Kept
from pmod_cli.calibration.calibrate import calibrate
from pmod_cli.calibration.measure import Outcome
from pmod_cli.calibration.options import CalibrateOptions
from pmod_cli.calibration.questions import PARTS, Question, draw_questions
from pmod_cli.calibration.selection import controls
from pmod_cli.calibration.subject import Subject
from pmod_cli.cli import main
from pmod_cli.conversion.calibrated import CheckpointBase
from pmod_cli.conversion.convert import convert, convert_back
from pmod_cli.conversion.inspection import inspect_checkpoint
from pmod_cli.conversion.plan import ROUTERS, plan_conversion
from pmod_cli.data.dataset import open_data
from pmod_cli.demo.data import heldout_samples, write_training_data
from pmod_cli.demo.job import BASELINE
from pmod_cli.generation import VisionLanguageModel
from pmod_cli.output.errors import PmodError
from pmod_cli.prompts import Prompt
from pmod_cli.recipe import default_recipe

TIGHT = [None] + [0.08] * 7


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_training_data(tmp_path_factory.mktemp("calibration") / "train", 200, seed=11)


def pmod(folder, ratios):
    text = ", ".join("null" if ratio is None else str(ratio) for ratio in ratios)
    recipe = default_recipe([f"mod={{schedule: explicit, ratios: [{text}]}}"])
    convert(plan_conversion(BASELINE, recipe=recipe), folder)
    return folder


@pytest.fixture(scope="module")
def tight(tmp_path_factory):
    return pmod(tmp_path_factory.mktemp("tight") / "pmod", TIGHT)


def options(model, data, output, **others) -> CalibrateOptions:
    return CalibrateOptions(str(model), str(data[0]), output, images=data[1], device="cpu", **others)


@pytest.fixture(scope="module")
def calibrated(tight, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("calibrated") / "out"
    seen = []
    asked = options(tight, data, output, samples=320, seed=1, batch_size=32)
    result = calibrate(asked, lambda *at: seen.append(at))
    return output, result, seen


def test_routers_beat_the_controls_and_are_written(calibrated, tight):
    output, result, seen = calibrated
    assert result["replaced"]
    assert result["not_beaten"] == []
    assert [row["retention_ratio"] for row in result["layers"]] == TIGHT
    by_name = {row["name"]: row for row in result["selections"]}
    assert by_name["dense"]["agreement"]["mean"] == 1.0
    assert {"same spread", "shifted spread", "random"} < set(by_name)  # fresh routers are the second
    for row in result["selections"]:
        assert row["gain"] is None or row["gain"]["divergence"]["low"] > 0
    assert {each["layer"] for each in result["routers"]} <= set(range(1, 8))
    assert {label for label, _, _ in seen} == {
        "dense answers", "attention of text", "coverage", "judgement", "curve",
    }  # fmt: skip
    assert all(done <= total for _, done, total in seen)
    assert json.loads((output / "calibration.json").read_text())["replaced"]
    assert (output / "calibration.png").stat().st_size > 10_000
    found = inspect_checkpoint(output)
    assert found["mod"]["coverage"] == result["coverage"] > 0
    assert found["initial_routers"] == 0
    assert found["provenance"]["calibration"]["replaced"]
    card = (output / "README.md").read_text()
    assert "`pmod calibrate`" in card
    assert not list(output.parent.glob(".*"))
    convert_back(output, output.parent / "back")
    assert (output.parent / "back" / "model.safetensors").read_bytes() == (
        BASELINE / "model.safetensors"
    ).read_bytes()


def test_the_checkpoint_beats_the_controls_on_held_out_questions(calibrated, tmp_path):
    """Questions of the demo's held-out scenes; the interval of the paired difference is above zero."""
    output = calibrated[0]
    base = CheckpointBase.open(output)
    subject = Subject.load(base, "auto", "cpu")
    asked = [
        Question(Prompt(each.question, (each.image,)), each.question_id.split("-")[0])
        for each in heldout_samples(60)
    ]
    kept = Kept(tmp_path)
    found = Bench.answer(subject, {"judge": asked}, kept, lambda *_: None, 50, 8)
    assert subject.ratios == TIGHT
    assert subject.own is not None
    ours = found.outcome("judge", TIGHT, subject.own, "")
    # The loaded checkpoint itself: what it generates is what was measured.
    loaded = VisionLanguageModel.load(output, device="cpu")
    prompts = [question.prompt for question in asked[:50]]
    said = [answer.text for answer in loaded.generate(prompts, max_new_tokens=8)]
    true = [each.answer for each in heldout_samples(60)[:50]]
    assert sum(map(str.__eq__, said, true)) >= 46
    for control in controls():
        theirs = found.outcome("judge", TIGHT, control, "")
        assert found.compare("judge", theirs.divergence, ours.divergence).low > 0, control.name
        assert found.compare("judge", ours.agreement, theirs.agreement).low > 0, control.name


def test_an_interrupted_run_goes_on(tight, data, tmp_path, monkeypatch):
    small = {"samples": 24, "batch_size": 24}
    measured, stop = [], 6
    plain = bench.measure

    def counting(*arguments):
        if len(measured) == stop:
            raise KeyboardInterrupt
        measured.append(arguments)
        return plain(*arguments)

    monkeypatch.setattr(bench, "measure", counting)
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        calibrate(options(tight, data, output, **small), lambda *_: None)
    assert not output.exists()
    first, stop = len(measured), 1000
    result = calibrate(options(tight, data, output, **small), lambda *_: None)
    went_on = len(measured) - first
    shutil.rmtree(output)
    alone = calibrate(options(tight, data, output, **small), lambda *_: None)
    assert len(measured) - first - went_on == first + went_on
    assert alone | {"seconds": 0} == result | {"seconds": 0}


def test_ratios_for_a_budget(data, tmp_path):
    result = calibrate(options(BASELINE, data, tmp_path / "out", samples=24, kv=0.4), lambda *_: None)
    assert {row["name"] for row in result["schedules"]} == {"paper", "linear", "constant", "searched"}
    for row in result["schedules"]:
        assert 0.3 < row["kv"] <= 0.4
    chosen = next(row for row in result["schedules"] if row["name"] == result["schedule"])
    assert [row["retention_ratio"] for row in result["layers"]] == chosen["ratios"]
    assert result["kv"] == chosen["kv"]
    loaded = VisionLanguageModel.load(tmp_path / "out", device="cpu")
    assert loaded.model.config.mod_config.retention_ratios == chosen["ratios"]
    zero = all(not bool(p.any()) for n, p in loaded.model.named_parameters() if ".router." in n)
    assert zero is not result["replaced"]


def test_no_picture_is_in_two_parts(data):
    parts = draw_questions(open_data(*data), 240, 0)
    assert {name: len(each) / 240 for name, each in parts.items()} == pytest.approx(PARTS, abs=0.03)
    pictures = [{question.picture for question in each} for each in parts.values()]
    assert len(set.union(*pictures)) == sum(map(len, pictures)) == 200
    again = draw_questions(open_data(*data), 240, 0)
    assert [q.prompt.text for q in again["fit"]] == [q.prompt.text for q in parts["fit"]]


def run(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    output = capsys.readouterr()
    return ended.value.code, output.out, output.err


def test_mistakes_are_one_line(data, tight, tmp_path, capsys):
    file, images = data
    start = ["calibrate", BASELINE, "--data", file, "--images", images, "--output", tmp_path / "out"]
    few = tmp_path / "few.json"
    few.write_text(json.dumps(json.loads(Path(file).read_text())[:2]))
    for words, message in (
        ([*start, "--flops", "0.5", "--kv", "0.5"], "--flops and --kv both say"),
        ([*start, "--flops", "1.5"], "1.5 is not a share"),
        ([*start, "--min-agreement", "95"], "outside [0, 1]"),
        ([*start, "--samples", "5"], "too few"),
        ([*start, "--schedule", "own"], "no schedule of its own"),
        ([*start, "--flops", "0.05"], "cannot be met"),
        (
            ["calibrate", BASELINE, "--data", few, "--images", images, "--output", tmp_path / "o"],
            "10 questions",
        ),
        (["calibrate", images, *start[2:]], "no config.json"),
        ([*start[:-1], tight], "exists"),
    ):
        code, out, err = run(words, capsys)
        assert (code, out) == (2, ""), err
        assert message in err
        assert err.count("\n") == 1, err
    assert not (tmp_path / "out").exists()


def test_a_gate_that_is_not_met(data, tmp_path, capsys):
    """At 2 % in six layers answers change."""
    model = pmod(tmp_path / "pmod", [None, None] + [0.02] * 6)
    words = ["--data", data[0], "--images", data[1], "--samples", "24", "--output", tmp_path / "out"]
    code, out, err = run(["calibrate", model, *words, "--min-agreement", "1"], capsys)
    assert code == 1
    assert err.splitlines()[-1].startswith("error: agreement 0.")
    assert "below --min-agreement 1 " in err
    assert "KL from dense" in out
    assert (tmp_path / "out" / "config.json").is_file()


def test_routers_that_a_checkpoint_brings_are_a_control(calibrated, data, tmp_path, capsys):
    first, second = calibrated[0], tmp_path / "out"
    words = ["--data", data[0], "--images", data[1], "--samples", "24", "--output", second, "--json"]
    code, out, _ = run(["calibrate", first, *words], capsys)
    assert code == 0
    result = json.loads(out)["result"]
    assert not result["replaced"]
    assert "its own routers" in result["not_beaten"]
    assert result["coverage"] == [calibrated[1]["coverage"]] * 8
    written = [load_file(folder / ROUTERS) for folder in (first, second)]
    assert written[0].keys() == written[1].keys()
    assert all(torch.equal(value, written[1][name]) for name, value in written[0].items())


def test_one_writer(tmp_path):
    with (
        Kept.keeping(tmp_path / "out", "one"),
        pytest.raises(PmodError, match="another pmod is writing"),
        Kept.keeping(tmp_path / "out", "two"),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_what_another_calibration_left_is_thrown_away(tmp_path):
    def interrupted(kept):
        kept.add("variant", Outcome(np.zeros(1), np.ones(1)))
        raise KeyboardInterrupt

    for name in ("broken", "other", "same"):
        with (
            pytest.raises(KeyboardInterrupt),
            Kept.keeping(tmp_path / name, "one") as kept,
        ):
            interrupted(kept)
    (tmp_path / ".broken.calibrating" / "settings.json").write_text("{")
    for name, digest, left in (("broken", "one", []), ("other", "two", []), ("same", "one", ["variant"])):
        with Kept.keeping(tmp_path / name, digest) as kept:
            assert list(kept.outcomes) == left
    assert not list(tmp_path.iterdir())
