"""``pmod doctor`` as typed, in an environment that works and in one that does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def doctor(*words: str, path: Path | None = None) -> tuple[int, str, str]:
    """Run it in a process of its own, with a folder before all others on the path."""
    folders = [str(folder) for folder in (path, ROOT) if folder]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders), "COLUMNS": "160"}
    command = [sys.executable, "-m", "pmod_cli", "doctor", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def healthy() -> dict[str, Any]:
    code, out, err = doctor("--json")
    assert code == 0, err
    document = json.loads(out)
    assert (document["schema_version"], document["command"]) == (1, "doctor")
    return document["result"]


def test_all_that_is_installed_works_here(healthy):
    assert healthy["ok"]
    # liger-kernel is for machines with a GPU, so no other extra brings it.
    packages = [package for package in healthy["packages"] if package["name"] != "liger-kernel"]
    assert {package["status"] for package in packages} == {"works"}
    assert all(package["version"] for package in packages)
    assert {command["command"] for command in healthy["commands"]} == {
        *("convert", "finetune", "profile", "eval", "generate", "visualize", "report", "demo", "serve")
    }
    assert all(command["works"] and not command["limits"] for command in healthy["commands"])


def test_the_machine_is_told(healthy):
    import torch

    assert healthy["python"] == ".".join(map(str, sys.version_info[:3]))
    assert len(healthy["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    for gpu in healthy["gpus"]:
        assert gpu["memory_bytes"] > 2**30
        assert isinstance(gpu["bf16"], bool)
    assert healthy["attention"]["implementation"] == "pmod_sdpa"
    assert healthy["offline"] is True  # the tests' own setting
    caches = {cache["what"]: cache for cache in healthy["caches"]}
    assert list(caches) == ["models", "data sets", "answers"]
    for cache in caches.values():
        assert cache["path"]
        assert cache["free_bytes"] > 0
    assert healthy["not_found_out"] == {}


def test_keys_are_documented(healthy):
    from tests.docs.test_json import check_keys

    check_keys(healthy, "doctor")
    for part in ("packages", "commands", "caches"):
        check_keys(healthy[part][0], "doctor")
    check_keys(healthy["attention"], "doctor")


def test_what_is_broken_and_what_mends_it(tmp_path):
    """Exit code 2, a table that still comes whole, one line on stderr; what a message says is no markup."""
    for root, text in {"lmms_eval": "", "peft": "raise AttributeError('[bold]no such[/bold] thing')"}.items():
        (tmp_path / root).mkdir()
        (tmp_path / root / "__init__.py").write_text(text)
    code, out, err = doctor(path=tmp_path)
    assert code == 2
    [line] = err.splitlines()
    assert line.startswith("error: does not work: lmms-eval, peft; the first: ModuleNotFoundError: ")
    assert line.endswith(f"({tmp_path / 'lmms_eval'} is imported in its place: rename it)")
    assert "AttributeError: [bold]no such[/bold] thing" in out
    rows = {
        cells[1].strip(): cells for cells in (line.split("│") for line in out.splitlines()) if len(cells) > 3
    }
    works = {
        verb: rows[verb][2].strip() == "works" for verb in ("convert", "finetune", "eval", "report", "demo")
    }
    assert works == {"convert": True, "finetune": False, "eval": False, "report": True, "demo": False}
    assert "lmms-eval is broken" in rows["eval"][3]
