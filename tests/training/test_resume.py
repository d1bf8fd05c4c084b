"""A run that is killed goes on as if it had not been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from pmod_cli.output.errors import PmodError
from pmod_cli.output.reading import read_json_lines
from pmod_cli.training.finetune import finetune
from pmod_cli.training.trainer import STAGING, last_checkpoint


def _start_and_stop(model, data, images, output, recipe, number, step):
    path = Path(output).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(json.loads(recipe.model_dump_json())))
    script = Path(__file__).parents[1] / "common" / "killed_run.py"
    words = [script, model, data, images, output, path, int(number), step]
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True)


def _curve(folder):
    return [(row["step"], row["loss"]) for row in read_json_lines(folder / "metrics.jsonl") if "loss" in row]


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
    assert (result["resumed_from"], result["steps"]) == (8, 12)
    assert not work.exists()
    resumed = _curve(output)
    assert [step for step, _ in resumed] == list(range(1, 13))
    assert [loss for _, loss in resumed] == pytest.approx([loss for _, loss in whole], rel=1e-5)


def test_sigterm_saves_and_exits_and_other_data_is_refused(
    pmod_start, demo_data, tmp_path, uninterrupted, baseline
):
    recipe, whole = uninterrupted
    output, work = tmp_path / "out", tmp_path / "out.training"

    def terminate(done, total, latest):
        if done == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(
        PmodError, match=r"stopped by SIGTERM after step [34]; a checkpoint is saved"
    ) as stopped:
        finetune(pmod_start, *demo_data, output, recipe=recipe, progress=terminate)
    assert stopped.value.exit_code == 143
    saved = last_checkpoint(work)
    # A checkpoint that was cut off is not resumed from.
    (work / STAGING / "checkpoint-9").mkdir(parents=True)
    assert last_checkpoint(work) == saved
    records = json.loads(demo_data[0].read_text())
    other = tmp_path / "other.json"
    other.write_text(json.dumps(records[:-1]))
    with pytest.raises(PmodError, match="the data changed"):
        finetune(pmod_start, other, demo_data[1], output, recipe=recipe, resume=True)
    finetune(pmod_start, *demo_data, output, recipe=recipe, resume=True)
    assert [loss for _, loss in _curve(output)] == pytest.approx([loss for _, loss in whole], rel=1e-5)


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(
    pmod_start, demo_data, tmp_path, uninterrupted, monkeypatch
):
    from pmod_cli.training.trainer import PmodTrainer

    recipe, whole = uninterrupted
    output, work = tmp_path / "out", tmp_path / "out.training"
    save = PmodTrainer._save_rng_state

    def killed(self, folder):
        if self.state.global_step == 8:
            raise KeyboardInterrupt  # weights and optimizer are written, the rest is not
        save(self, folder)

    monkeypatch.setattr(PmodTrainer, "_save_rng_state", killed)
    with pytest.raises(KeyboardInterrupt):
        finetune(pmod_start, *demo_data, output, recipe=recipe)
    monkeypatch.undo()
    assert (work / STAGING / "checkpoint-8" / "optimizer.pt").exists()
    assert last_checkpoint(work).name == "checkpoint-4"
    result = finetune(pmod_start, *demo_data, output, recipe=recipe, resume=True)
    assert result["resumed_from"] == 4
    assert [loss for _, loss in _curve(output)] == pytest.approx([loss for _, loss in whole], rel=1e-5)


def test_killed_between_the_last_step_and_the_result(pmod_start, demo_data, tmp_path, recipe, monkeypatch):
    from pmod_cli.training import finetune as run

    output = tmp_path / "out"

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "save_result", killed)
    settings = recipe(max_steps=4)
    with pytest.raises(KeyboardInterrupt):
        finetune(pmod_start, *demo_data, output, recipe=settings)
    monkeypatch.undo()
    assert last_checkpoint(tmp_path / "out.training").name == "checkpoint-4"
    result = finetune(pmod_start, *demo_data, output, recipe=settings, resume=True)
    assert result["steps"] == 4
    assert [step for step, _ in _curve(output)] == [1, 2, 3, 4]


def test_lora_resumes_too(pmod_start, demo_data, tmp_path, recipe, monkeypatch):
    from pmod_cli.training.monitor import Monitor

    settings = recipe(max_steps=6, lora={"r": 4, "alpha": 8, "dropout": 0.0})
    torch.manual_seed(1)  # what was drawn before does not matter: the recipe's seed does
    finetune(pmod_start, *demo_data, tmp_path / "whole", recipe=settings)
    finished = Monitor.on_step_end

    def killed(self, args, state, control, **kwargs):
        finished(self, args, state, control, **kwargs)
        if state.global_step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Monitor, "on_step_end", killed)
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        finetune(pmod_start, *demo_data, output, recipe=settings)
    monkeypatch.undo()
    # What does not decide the curve may be changed; a finer micro batch is one of these.
    again = settings.model_copy(update={"train": settings.train.model_copy(update={"micro_batch_size": 2})})
    result = finetune(pmod_start, *demo_data, output, recipe=again, resume=True)
    assert result["resumed_from"] == 4
    whole = [loss for _, loss in _curve(tmp_path / "whole")]
    assert [loss for _, loss in _curve(output)] == pytest.approx(whole, rel=1e-4)
