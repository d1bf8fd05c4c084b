"""Without an optional package, commands that need it say what to install, and the others work."""

from __future__ import annotations

import json
import sys

import pytest

from pmod_cli.cli import main
from pmod_cli.demo.job import BASELINE

EXTRAS = ("lmms_eval", "fvcore", "datasets", "matplotlib", "peft", "tensorboard")


@pytest.fixture
def _bare(monkeypatch):
    """As if no extra was installed."""
    for name in list(sys.modules):
        if name.split(".")[0] in EXTRAS:
            monkeypatch.delitem(sys.modules, name)
    for name in EXTRAS:
        monkeypatch.setitem(sys.modules, name, None)


def run(capsys, *words):
    code = 0
    try:
        main([str(word) for word in words])
    except SystemExit as error:
        code = error.code or 0
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.usefixtures("_bare")
def test_convert_generate_and_timing_need_no_extra(tmp_path, capsys):
    model = tmp_path / "pmod"
    assert run(capsys, "convert", BASELINE, model, "--recipe", "demo")[0] == 0
    code, out, _ = run(capsys, "generate", model, "--prompt", "How many shapes are there?", "--json")
    assert code == 0
    assert json.loads(out)["result"]["answer"]
    options = ["--latency", "--repeats", "1", "--new-tokens", "2", "--json"]
    code, out, _ = run(capsys, "profile", model, *options)
    assert code == 0
    assert json.loads(out)["result"]["latency"]["models"]["pmod"]["seconds"]["prefill"]["median"] > 0


@pytest.mark.usefixtures("_bare")
@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (["eval", BASELINE, "--tasks", "gqa", "--output", "eval"], "eval"),
        (["demo", "--output", "demo"], "eval"),
        (["profile", "llava-1.5-7b", "--counter", "fvcore"], "profile"),
        (["profile", "llava-1.5-7b", "--plot", "profile.png"], "plot"),
        (["visualize", BASELINE, "--image", "x.png", "--prompt", "x", "-o", "sheet.png"], "plot"),
    ],
    ids=lambda value: " ".join(map(str, value[:1])) if isinstance(value, list) else value,
)
def test_a_missing_extra_is_named(words, extra, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "x.png" in words:
        from PIL import Image

        Image.new("RGB", (80, 80)).save("x.png")
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert f"is not installed (pip install 'pmod-cli[{extra}]')" in last
