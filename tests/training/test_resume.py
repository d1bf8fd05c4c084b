"""A run that is killed goes on as if it had not been."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pmod_cli.errors import PmodError
from pmod_cli.training.monitor import read_metrics
from pmod_cli.training.run import finetune
from pmod_cli.training.trainer import COMPLETE, last_checkpoint


def _start_and_stop(model, data, images, output, recipe, number, step):
    path = Path(output).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(json.loads(recipe.model_dump_json())))
    script = Path(__file__).with_name("killed_run.py")
    words = [script, model, data, images, output, path, int(number), step]
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True)


def _curve(folder):
    return [(row["step"], row["loss"]) for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


@pytest.fixture(scope="module")
def uninterrupted(pmod_start, demo_data, tmp_path_factory):
    from pmod_cli.recipe import parse_recipe

    train = {
        "max_steps": 12,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "learning_rate": 1e-3,
        "dtype": "float32",
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_steps": 4,
        "ratio_warmup_steps": 10,
    }
    recipe = parse_recipe({"name": "resume", "train": train})
    output = tmp_path_factory.mktemp("whole") / "out"
    finetune(pmod_start, *demo_data, output, recipe=recipe)
    return recipe, _curve(output)


def test_kill_9_then_resume_gives_the_same_curve(pmod_start, demo_data, tmp_path, uninterrupted):
    recipe, whole = uninterrupted
    output, work = tmp_path / "out", tmp_path / "out.training"
    # 12 steps over 32 samples in batches of 4: step 10 is in the second epoch.
    killed = _start_and_stop(pmod_start, *demo_data, output, recipe, signal.SIGKILL, 10)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not output.exists()
    assert last_checkpoint(work).name == "checkpoint-8"
    with pytest.raises(PmodError, match="unfinished run"):
        finetune(pmod_start, *demo_data, output, recipe=recipe)
    result = finetune(pmod_start, *demo_data, output, recipe=recipe, resume=True)
    assert (result.resumed_from, result.steps) == (8, 12)
    assert not work.exists()
    resumed = _curve(output)
    assert [step for step, _ in resumed] == list(range(1, 13))
    assert [loss for _, loss in resumed] == pytest.approx([loss for _, loss in whole], rel=1e-5)


def test_sigterm_saves_and_exits_and_other_data_is_refused(
    pmod_start, demo_data, tmp_path, uninterrupted, baseline
):
    recipe, whole = uninterrupted
    output, work = tmp_path / "out", tmp_path / "out.training"
    stopped = _start_and_stop(pmod_start, *demo_data, output, recipe, signal.SIGTERM, 3)
    assert stopped.returncode == 143, stopped.stderr
    assert "after step 3" in stopped.stdout or "after step 4" in stopped.stdout
    saved = last_checkpoint(work)
    # A checkpoint that was cut off is not resumed from.
    (work / "checkpoint-9").mkdir()
    assert last_checkpoint(work) == saved
    records = json.loads(demo_data[0].read_text())
    other = tmp_path / "other.json"
    other.write_text(json.dumps(records[:-1]))
    with pytest.raises(PmodError, match="the data changed"):
        finetune(pmod_start, other, demo_data[1], output, recipe=recipe, resume=True)
    finetune(pmod_start, *demo_data, output, recipe=recipe, resume=True)
    assert [loss for _, loss in _curve(output)] == pytest.approx([loss for _, loss in whole], rel=1e-5)
    assert not list(output.rglob(COMPLETE))
