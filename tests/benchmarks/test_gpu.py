"""The script for GPUs, with tiny models on the CPU: it runs, saves, and prints tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks import gpu

SCRIPT = Path(gpu.__file__)
ABSENT = ("PIL", "torchvision", "wrapt", "accelerate", "peft", "datasets", "jinja2", "fvcore", "matplotlib")
WITHOUT_THEM = f"""
import runpy, sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {ABSENT!r} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a script on a machine that has only what a GPU box may have."""


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> Path:
    """What the script writes by default."""
    path = tmp_path_factory.mktemp("gpu") / "result.json"
    words = [str(SCRIPT), "--tiny", "--device", "cpu", "--output", str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", WITHOUT_THEM, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=path.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    return path


def test_every_section_is_measured(result):
    sections = json.loads(result.read_text())["sections"]
    assert list(sections) == [name for name in gpu.SECTIONS if name not in gpu.OPTIONAL]
    for name, section in sections.items():
        assert section["cases"], name
        assert not section["skipped"], name
        assert not [case for case in section["cases"] if "error" in case], name
    for name in ("cold", "prefill", "decode", "throughput", "train"):
        for case in sections[name]["cases"]:
            assert case["dense_setting"] in ("dense", "dense without cuDNN")
            assert case["ratio"], f"{name}, {case['case']}"
            assert all(value > 0 for value in case["ratio"].values())
    for case in sections["trace"]["cases"]:
        assert case["pmod"]["prefill"]["operations"] > case["pmod"]["decode_step"]["operations"] > 0


def test_the_tables_have_every_section(result, capsys):
    gpu.main(["--tables", str(result)])
    printed = capsys.readouterr().out
    sections = json.loads(result.read_text())["sections"]
    for name, section in sections.items():
        assert f"**{name}** (" in printed
        for case in section["cases"]:
            assert case["case"].split(",")[0] in printed
    ratio = sections["train"]["cases"][0]["ratio"]["ms"]
    assert f" {ratio:.2f} |" in printed


def test_both_models_compiled_into_the_same_file(result, tmp_path, capsys):
    path = tmp_path / "result.json"
    path.write_bytes(result.read_bytes())
    gpu.main(["--tiny", "--device", "cpu", "--output", str(path), "--sections", "compile"])
    before, after = (json.loads(file.read_text())["sections"] for file in (result, path))
    (case,) = after.pop("compile")["cases"]
    assert after == before
    assert case["ratio"].keys() == {"prefill_ms", "decode_ms"}, case
    assert case["first_seconds"].keys() == {"pmod", "dense"}
    gpu.main(["--tables", str(path)])
    assert "| first prompt and tokens |" in capsys.readouterr().out


def test_time_that_is_over_skips_the_rest_and_a_failure_only_itself():
    from tests.benchmarks.gpu_bench.run import run_section

    def fails() -> dict[str, int]:
        raise RuntimeError("no such kernel\nmore")

    *_, section = run_section([("first", fails), ("second", lambda: {"value": 1})], limit=60)
    assert [case.get("error") for case in section["cases"]] == ["RuntimeError: no such kernel", None]
    (section,) = run_section([("first", lambda: {"value": 1})], limit=0)
    assert (section["cases"], section["skipped"]) == ([], ["first"])


def test_results_of_two_machines_do_not_mix(tmp_path, capsys):
    path = tmp_path / "result.json"
    path.write_text('{"schema_version": 1, "machine": {"device": "another"}, "sections": {}}')
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--tiny", "--device", "cpu", "--output", str(path), "--sections", "trace"])
    assert stopped.value.code == 2
    assert "another machine" in capsys.readouterr().err
    assert "another" in path.read_text()


def test_all_sections_are_known_everywhere():
    from tests.benchmarks.gpu_bench import sections, tables

    assert list(gpu.SECTIONS) == list(sections.CASES) == list(tables.ROWS) == list(tables.HEADS)
    assert sum(limit for name, limit in gpu.SECTIONS.items() if name not in gpu.OPTIONAL) <= 8 * 60
