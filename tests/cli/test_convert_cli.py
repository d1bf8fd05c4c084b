"""``pmod convert`` and ``pmod inspect`` as typed: output, exit codes, and what is imported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pmod_cli.cli import main
from pmod_cli.demo.job import BASELINE
from tests.common.checkpoints import contents, make_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture
def pmod(capsys):
    def run(*words):
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        output = capsys.readouterr()
        return ended.value.code, output.out, output.err

    return run


def test_json_is_all_of_stdout(pmod, tmp_path):
    code, out, err = pmod("convert", BASELINE, tmp_path / "pmod", "--recipe", "demo", "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert (document["schema_version"], document["command"]) == (1, "convert")
    assert set(document["result"]) == {
        "source", "destination", "to", "format", "family", "recipe", "layers", "mean_retention",
        "router_parameters", "weight_bytes", "methods", "notes", "seconds", "pushed_to",
    }  # fmt: skip
    code, out, err = pmod("inspect", tmp_path / "pmod", "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document["command"] == "inspect"
    assert document["result"]["initial_share"] == 1.0
    code, out, _ = pmod("convert", tmp_path / "pmod", tmp_path / "back", "--to", "baseline", "--json")
    assert code == 0
    assert json.loads(out)["result"]["to"] == "baseline"
    assert contents(tmp_path / "back") == contents(BASELINE)


def test_in_words(pmod, tmp_path):
    code, out, _ = pmod(
        "convert", BASELINE, tmp_path / "pmod", "--set", "mod.floor=0.25", "--set", "mod.coverage=2"
    )
    assert code == 0
    assert "6 of 8 layers are MoD" in out
    assert "1 hard link, 1 written" in out
    code, out, _ = pmod("inspect", tmp_path / "pmod")
    assert code == 0
    assert "0.2500" in out
    assert "6 still at their initial value (100 %)" in out
    assert ", coverage 2\n" in out
    assert "recipe default" in out
    code, out, _ = pmod("convert", tmp_path / "pmod", tmp_path / "back", "--to", "baseline")
    assert "the dense baseline, 582 router parameters taken out" in out


def test_dry_run(pmod, tmp_path):
    code, out, _ = pmod("convert", BASELINE, "--dry-run")
    assert code == 0
    for text in ("huggingface format", "0.8117", "582 parameters added", "80x80 pixels", "KV cache", "free"):
        assert text in out
    code, out, _ = pmod("convert", BASELINE, tmp_path / "pmod", "--dry-run", "--json")
    result = json.loads(out)["result"]
    assert result["dry_run"] is True
    assert result["expected"]["kv_bytes"]["ratio"] < 1
    assert not list(tmp_path.iterdir())
    assert pmod("convert", BASELINE, BASELINE, "--dry-run")[0] == 2


def test_one_line_and_exit_code_2(pmod, tmp_path):
    source = make_checkpoint(tmp_path / "source")
    pmod("convert", source, tmp_path / "pmod")
    shard = tmp_path / "broken"
    make_checkpoint(shard)
    (shard / "model.safetensors").write_bytes(b"1234")
    before = contents(tmp_path)
    for words, message in (
        ([tmp_path / "none", tmp_path / "x"], "no folder"),
        ([source], "no DESTINATION"),
        ([source, tmp_path / "pmod"], "--force replaces it"),
        ([source, source, "--force"], "same folder"),
        ([tmp_path / "pmod", tmp_path / "x"], "is p-MoD already (--to baseline"),
        ([source, tmp_path / "x", "--to", "baseline"], "dense llava checkpoint already"),
        ([shard, tmp_path / "x"], "truncated or corrupt"),
        ([source, tmp_path / "x", "--recipe", "llava-next-7b"], "is for llava_next"),
        ([source, tmp_path / "x", "--recipe", "demoo"], "did you mean demo?"),
        ([source, tmp_path / "x", "--set", "mod.flor=1"], "did you mean mod.floor?"),
        ([source, tmp_path / "x", "--set", "mod.floor=0"], "outside (0, 1]"),
        ([source, tmp_path / "x", "--to", "baseline", "--recipe", "demo"], "leave them out"),
    ):
        code, out, err = pmod("convert", *words)
        assert (code, out) == (2, ""), words
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert message in err
    code, out, err = pmod("inspect", source)
    assert (code, out) == (2, "")
    assert "pmod convert makes it p-MoD" in err
    assert contents(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_that_is_not_writable(pmod, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    code, _, err = pmod("convert", BASELINE, tmp_path / "closed" / "x")
    assert code == 2
    assert "is not writable" in err


def test_converting_imports_neither_torch_nor_transformers(tmp_path):
    code = f"""
import sys
from pmod_cli.cli import main
for words in ("convert {BASELINE} pmod", "inspect pmod", "convert pmod back --to baseline"):
    try:
        main(words.split())
    except SystemExit as ended:
        assert not ended.code
heavy = {{"torch", "transformers", "fvcore", "lmms_eval", "matplotlib"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr


def test_ctrl_c_is_130(tmp_path):
    """A real SIGINT to a real process that is busy writing."""
    code = f"""
import sys, time
from pmod_cli.checkpoints import write
place = write.place
def slowly(*arguments):
    place(*arguments)
    print("busy", flush=True)
    time.sleep(60)
write.place = slowly
from pmod_cli.cli import main
main(["convert", {str(BASELINE)!r}, "pmod"])
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        # A shell ignores SIGINT in what it starts in the background, the test run itself perhaps.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "busy\n"
    assert list(tmp_path.iterdir())
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == "error: interrupted; what was finished is kept\n"
    assert not list(tmp_path.iterdir())
