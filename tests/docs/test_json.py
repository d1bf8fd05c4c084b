"""What ``--json`` prints: one object, whose keys ``docs/json.md`` names."""

from __future__ import annotations

import contextlib
import json
import re

import pytest

from pmod_cli.cli import main
from tests.common.commands import ROOT

MODEL = "{demo}/models/pmod"
PICTURE = "{demo}/data/example.png"
TRAINING = ["--data", "{demo}/data/train/train.json", "--images", "{demo}/data/train/images"]
SMALL = ["--set=train.max_steps=1", "--set=train.global_batch_size=2", "--set=train.micro_batch_size=2"]
TASK = ["--tasks", "pmod_demo", "--include-path", "{demo}/tasks", "--limit", "4", "--batch-size", "4"]
PROMPT = ["--image", PICTURE, "--prompt", "How many shapes are there?"]

CASES = {
    "convert": ["{demo}/models/baseline", "out", "--recipe", "demo"],
    "inspect": [MODEL],
    "data check": TRAINING[1:],
    "calibrate": ["{demo}/models/baseline", *TRAINING, "--output", "out", "--samples", "24"],
    "finetune": ["{demo}/models/pmod-start", *TRAINING, "--output", "out", "--recipe=demo", *SMALL],
    "profile": [MODEL, "--latency", "--repeats", "1", "--new-tokens", "2"],
    "eval": [MODEL, *TASK, "--output", "out"],
    "generate": [MODEL, *PROMPT],
    "visualize": [MODEL, *PROMPT, "-o", "out.png"],
    "report": ["{demo}", "-o", "out.html"],
}


@pytest.mark.parametrize("verb", CASES)
def test_one_object_with_documented_keys(verb, demo_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [*verb.split(), *(word.format(demo=demo_folder) for word in CASES[verb]), "--json"]
    with contextlib.suppress(SystemExit):  # a failure prints no object
        main(words)
    document = json.loads(capsys.readouterr().out)
    assert list(document) == ["schema_version", "command", "result"]
    assert document["schema_version"] == 1
    assert document["command"] == verb
    check_keys(document["result"], verb)


def test_keys_of_the_demo(demo_folder):
    report = json.loads((demo_folder / "report.json").read_text())
    check_keys(report, "demo")
    check_keys(report["rows"][0], "demo")


def check_keys(result, verb):
    """The section of ``docs/json.md`` about a command names every key."""
    page = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    section = page.split(f"\n## `pmod {verb}`\n")[1].split("\n## ")[0]
    # `key`, `section.key`, `section`: any of them names it.
    named = set(re.findall(r"[A-Za-z_]+", " ".join(re.findall(r"`([^`\n]+)`", section))))
    missing = [key for key in result if key not in named]
    assert not missing, f"docs/json.md, pmod {verb}, does not name {missing}"
