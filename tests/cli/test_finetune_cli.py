"""``pmod finetune`` and ``pmod data check`` as typed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pmod_cli.demo import data
from pmod_cli.demo.run import BASELINE

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def demo_data(tmp_path_factory):
    return data.write_training_data(tmp_path_factory.mktemp("data") / "train", 6)


def pmod(*words):
    return subprocess.run(
        [sys.executable, "-m", "pmod_cli", *map(str, words)], capture_output=True, text=True, cwd=ROOT
    )


def test_json_is_all_of_stdout(demo_data, tmp_path):
    path, images = demo_data
    words = ["finetune", BASELINE, "--data", path, "--images", images, "--output", tmp_path / "out"]
    small = ["--recipe", "demo", "--set", "train.max_steps=2", "--set", "train.global_batch_size=2"]
    done = pmod(*words, *small, "--set", "train.micro_batch_size=2", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["command"] == "finetune"
    assert document["result"]["steps"] == 2
    assert "vision tower" in done.stderr
    again = pmod(*words, *small)
    assert again.returncode == 2
    assert again.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "--force" in again.stderr


def test_bad_input_is_one_line(tmp_path):
    done = pmod("finetune", BASELINE, "--data", "none.json", "--images", ".", "--output", tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no data file none.json\n"


def test_data_check(demo_data, tmp_path):
    path, images = demo_data
    assert pmod("data", "check", path, "--images", images, "--model", BASELINE).returncode == 0
    records = json.loads(path.read_text())
    records[0]["image"] = "none.png"
    broken, clean = tmp_path / "broken.json", tmp_path / "clean.json"
    broken.write_text(json.dumps(records))
    found = pmod("data", "check", broken, "--images", images, "--json")
    assert found.returncode == 1
    assert json.loads(found.stdout)["result"]["counts"] == {"missing image": 1}
    fixed = pmod("data", "check", broken, "--images", images, "--fix", clean)
    assert fixed.returncode == 0
    assert json.loads(clean.read_text()) == records[1:]
