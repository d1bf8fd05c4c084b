"""``pmod finetune`` and ``pmod data check`` as typed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pmod_cli.demo import data
from pmod_cli.demo.job import BASELINE

ROOT = Path(__file__).parents[2]
SMALL = [f"--set=train.{setting}" for setting in ("max_steps=2", "global_batch_size=2", "micro_batch_size=2")]


@pytest.fixture(scope="module")
def demo_data(tmp_path_factory):
    return data.write_training_data(tmp_path_factory.mktemp("data") / "train", 6)


@pytest.fixture
def pmod(capsys):
    """Runs ``pmod WORDS`` in this process; gives exit code, stdout and stderr."""
    from pmod_cli.cli import main

    def run(*words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        shown = capsys.readouterr()
        return ended.value.code or 0, shown.out, shown.err

    return run


def test_json_is_all_of_stdout(demo_data, tmp_path):
    """In a process of its own: nothing that libraries print gets between."""
    path, images = demo_data
    words = ["finetune", BASELINE, "--data", path, "--images", images, "--output", tmp_path / "out"]
    command = [sys.executable, "-m", "pmod_cli", *map(str, words), "--recipe", "demo", *SMALL, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["command"] == "finetune"
    assert document["result"]["steps"] == 2
    for shown in ("vision tower", "memory per device", "loss", "samples/s", "GiB"):
        assert shown in done.stderr
    assert "Writing model shards" not in done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        "config.json",
        "metrics.jsonl",
        "model.safetensors",
        "recipe.yaml",
        "training.json",
        "training.png",
    }


def test_other_commands_take_the_result(pmod, demo_data, tmp_path):
    path, images = demo_data
    out = tmp_path / "out"
    words = ["finetune", BASELINE, "--data", path, "--images", images, "--output", out, "--recipe", "demo"]
    code, shown, _ = pmod(*words, *SMALL)
    assert code == 0
    assert shown.startswith(f"{out}: 2 steps, loss ")
    code, shown, error = pmod("profile", out, "--json")
    assert code == 0, error
    assert json.loads(shown)["result"]["dense"]["parameters"]["total"] == 1_271_232
    code, _, error = pmod(*words, *SMALL)
    assert code == 2
    assert error == f"error: {out} exists (--force replaces it)\n"


def bad_inputs(tmp_path):
    text = tmp_path / "text.json"
    turns = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "yes"}]
    text.write_text(json.dumps([{"conversations": turns}] * 3))
    rotten = tmp_path / "rotten.json"
    rotten.write_text(json.dumps([{"conversations": turns}, {"conversations": []}]))
    wide = tmp_path / "wide.json"
    wide.write_text(json.dumps([{"image": "a.png", "conversations": turns}]))
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "llava"')
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}')
    good = {"model": BASELINE, "data": text, "output": tmp_path / "out"}
    return [
        ({**good, "data": tmp_path / "none.json"}, [], "no data file"),
        ({**good, "model": tmp_path / "none"}, [], "no checkpoint folder"),
        ({**good, "model": broken}, [], "config.json"),
        ({**good, "model": other}, [], "model type 'bert' is not supported (supported: llava"),
        (good, ["--recipe", "demoo"], "no recipe named 'demoo' (did you mean demo?)"),
        (good, ["--set", "train.learning_rat=1"], "did you mean train.learning_rate?"),
        (good, ["--set", "train.learning_rate=-1"], "train.learning_rate: "),
        (good, ["--set", "train.lr_scheduler=cosin"], "train.lr_scheduler: "),
        (good, ["--set", "train.report_to=tensorbord"], "train.report_to"),
        (good, ["--set", "train.dtype=float16"], "float16 needs a GPU"),
        (good, ["--recipe", "llava-next-7b"], "is for llava_next, and"),
        (good, ["--set", "train.micro_batch_size=3"], "is not a multiple of"),
        (good, ["--merge"], "--merge is for LoRA"),
        ({**good, "data": rotten}, ["--set", "train.max_bad_samples=0"], "1 samples cannot be used"),
        ({**good, "data": wide}, [], "names image files (--images says which folder"),
        ({**good, "data": wide}, ["--images", tmp_path / "none"], "no image folder"),
        ({**good, "data": tmp_path / "empty"}, [], "cannot open data set"),
        ({**good, "output": tmp_path / "file" / "out"}, [], "file is a file, so"),
        ({**good, "output": tmp_path / "file"}, ["--force"], "is a file, not a folder"),
        ({**good, "output": tmp_path}, [], "exists (--force replaces it)"),
    ]


def test_bad_input_is_one_line_and_starts_nothing(pmod, tmp_path):
    for places, more, message in bad_inputs(tmp_path):
        before = {path.name for path in tmp_path.iterdir()}
        words = ["finetune", places["model"], "--data", places["data"], "--output", places["output"], *more]
        code, out, error = pmod(*words)
        assert (code, out, error.count("\n")) == (2, "", 1), error
        assert error.startswith("error: ")
        assert message in error
        assert {path.name for path in tmp_path.iterdir()} == before


def test_fsdp_on_the_cpu_is_refused_not_pretended(pmod, tmp_path, demo_data, monkeypatch):
    path, images = demo_data
    words = ["finetune", BASELINE, "--data", path, "--images", images, "--output", tmp_path / "out"]
    for variable in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        with monkeypatch.context() as patched:
            patched.setenv(variable, "true")
            code, _, error = pmod(*words, "--recipe", "demo", *SMALL)
        assert code == 2
        assert "on the CPU the Trainer would silently run DDP" in error


@pytest.mark.parametrize(
    "wrong",
    [
        "RANK=x",
        "RANK=1",
        "WORLD_SIZE=0",
        "LOCAL_RANK=",
        "LOCAL_WORLD_SIZE=-3",
        "ACCELERATE_USE_CPU=x",
        "ACCELERATE_DYNAMO_BACKEND=x",
    ],
)
@pytest.mark.parametrize("command", ["finetune", "eval", "demo"])
def test_a_launchers_variable_that_means_nothing(pmod, demo_data, tmp_path, monkeypatch, command, wrong):
    path, images = demo_data
    given = {
        "finetune": [BASELINE, "--data", path, "--images", images],
        "eval": [BASELINE, "--tasks", "pope"],
        "demo": ["--steps", 1],
    }
    monkeypatch.setenv(*wrong.split("=", 1))
    code, out, error = pmod(command, *given[command], "--output", tmp_path / "out")
    assert (code, out, error.count("\n")) == (2, "", 1), error
    assert error.startswith(f"error: {wrong.split('=')[0]}")
    assert not any(tmp_path.iterdir())


def test_data_check(pmod, demo_data, tmp_path):
    path, images = demo_data
    code, _, _ = pmod("data", "check", path, "--images", images, "--model", BASELINE, "--recipe", "demo")
    assert code == 0
    records = json.loads(path.read_text())
    records[0]["image"] = "none.png"
    broken, clean = tmp_path / "broken.json", tmp_path / "clean.json"
    broken.write_text(json.dumps(records))
    code, out, error = pmod("data", "check", broken, "--images", images, "--json")
    assert code == 1
    assert json.loads(out)["result"]["counts"] == {"missing image": 1}
    assert "error: 1 of 6 records are not fit for training" in error
    code, out, _ = pmod("data", "check", broken, "--images", images, "--fix", clean)
    assert code == 0
    assert "missing image" in out
    assert json.loads(clean.read_text()) == records[1:]
    short = [f"--model={BASELINE}", "--max-length", "105"]
    code, out, _ = pmod("data", "check", path, "--images", images, "--json", *short)
    assert code == 1
    assert json.loads(out)["result"]["counts"] == {"too long": 6}
