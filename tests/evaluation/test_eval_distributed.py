"""Two processes over gloo give the scores of one; and lmms-eval's own command line finds the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from pmod_cli import devices
from pmod_cli.evaluation.evaluate import evaluate
from pmod_cli.evaluation.options import EvalSettings
from tests.common.eval_models import save_parrot, save_pmod, score_of
from tests.common.paper_fixtures import Fixtures

TASKS = ["local_qa", "pope_full", "mme", "mmbench_en_dev_static"]
SETTINGS = EvalSettings(max_new_tokens=4, batch_size=4)


@pytest.fixture(scope="module")
def fixtures(tmp_path_factory):
    return Fixtures(tmp_path_factory.mktemp("paper") / "fixtures")


def launch(number, arguments):
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={number}",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launcher, "-m", "pmod_cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)


def test_two_processes_give_the_scores_of_one(llava, local_task, fixtures, tmp_path):
    """A p-MoD model that says Yes to everything, so that scores are none of 0 and 100, and a random baseline."""
    pmod = save_pmod(save_parrot(tmp_path / "parrot"), tmp_path / "pmod")
    alone = evaluate(
        pmod,
        TASKS,
        baseline=llava,
        include_path=[local_task, fixtures.include],
        output=tmp_path / "alone",
        settings=SETTINGS,
    )
    where = ["--include-path", local_task, "--include-path", fixtures.include, "--output", tmp_path / "two"]
    assert score_of(alone, "mme") == pytest.approx(150.0)
    assert score_of(alone, "pope_full") == pytest.approx(200 / 3)
    how = [
        "--tasks",
        ",".join(TASKS),
        "--batch-size",
        "4",
        "--max-new-tokens",
        "4",
        "--json",
        "--max-drop",
        "-500",
    ]
    done = launch(2, ["eval", str(pmod), "--baseline", str(llava), *map(str, where), *how])
    # The gate is one that cannot be met: the launcher passes its exit code on.
    assert done.returncode == 1, done.stderr
    together = json.loads(done.stdout)["result"]
    assert together["environment"]["processes"] == 2
    assert together["tasks"] == json.loads(json.dumps([task.to_dict() for task in alone.tasks]))
    assert together["model"]["answers"]["generated"] == alone.model["answers"]["generated"]
    assert len(together["missed"]) == len(TASKS)
    assert "allowed -500" in done.stderr
    for path in sorted((tmp_path / "alone" / "samples").iterdir()):
        assert (tmp_path / "two" / "samples" / path.name).read_text() == path.read_text()
    kept = {path.name for path in (tmp_path / "two" / "answers").rglob("rank*.jsonl")}
    assert kept == {"rank0.jsonl", "rank1.jsonl"}
    # One process goes on from what two have answered.
    again = evaluate(
        pmod, TASKS, include_path=[local_task, fixtures.include], output=tmp_path / "two", settings=SETTINGS
    )
    assert again.model["answers"]["generated"] == 0


def test_each_process_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert devices.own_device(None) is None
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert devices.own_device(None) == devices.own_device("cuda") == "cuda:3"
    assert devices.own_device("cpu") == "cpu"
    assert devices.own_device("cuda:1") == "cuda:1"


def test_lmms_evals_own_command_line(pmod, local_task, tmp_path, monkeypatch, capfd):
    """``lmms-eval eval --model pmod --model_args pretrained=...``: found through the entry point, same score."""
    from lmms_eval.cli.dispatch import main

    ours = evaluate(pmod, ["local_qa"], include_path=local_task, settings=SETTINGS)
    monkeypatch.chdir(tmp_path)
    model_args = f"pretrained={pmod},max_new_tokens=4,device=cpu"
    arguments = ["lmms-eval", "eval", "--model", "pmod", "--model_args", model_args, "--tasks", "local_qa"]
    arguments += [
        "--include_path",
        str(local_task),
        "--batch_size",
        "4",
        "--output_path",
        str(tmp_path / "theirs"),
    ]
    monkeypatch.setattr(sys, "argv", [*arguments, "--log_samples"])
    main()
    [results] = (tmp_path / "theirs").rglob("*_results.json")
    scores = json.loads(results.read_text())["results"]["local_qa"]
    expected = ours.tasks[0].model.metrics["local_qa"]
    assert {key: scores[key] for key in expected} == expected
    [samples] = (tmp_path / "theirs").rglob("*_samples_local_qa.jsonl")
    assert len(samples.read_text().splitlines()) == 12
