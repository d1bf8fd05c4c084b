"""Without an optional package, or with one that is broken, the commands that need it say so before any work is done."""

from __future__ import annotations

import itertools
import json
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from pmod_cli.cli import main
from pmod_cli.demo import data
from pmod_cli.demo.job import BASELINE
from pmod_cli.extras import OPTIONAL, import_remedy, starting
from pmod_cli.output.errors import PmodError

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


MODULES = {
    "empty": "",
    "ImportError": "from os import no_such_name",
    "AttributeError": "raise AttributeError('no [bold]such[/bold] attribute\\nin two lines')",
    "SystemExit": "print('on stdout'); raise SystemExit(3)",
}
"""Kind -> what stands in a package that is there and cannot be used."""

TRAIN = ["finetune", BASELINE, "--data", "DATA", "--images", "IMAGES", "--output", "out", "--recipe=demo"]
EVAL = ["eval", BASELINE, "--tasks", "gqa", "--output", "out"]
DEMO = ["demo", "--output", "out"]
COMMANDS = {
    "lmms_eval": (EVAL, DEMO),
    "datasets": (
        EVAL,
        DEMO,
        ["finetune", BASELINE, "--data", "TABLE", "--output", "out", "--recipe=demo"],
        ["data", "check", "TABLE"],
    ),
    "fvcore": (["profile", "llava-1.5-7b", "--counter", "fvcore"], DEMO),
    "fastapi": (["serve", BASELINE],),
    "peft": ([*TRAIN, "--set", "train.lora={}"],),
    "tensorboard": ([*TRAIN, "--set", "train.report_to=[tensorboard]"],),
    "matplotlib": (
        ["profile", "llava-1.5-7b", "--plot", "out"],
        ["visualize", BASELINE, "--image", "x.png", "--prompt", "x", "-o", "out.png"],
        DEMO,
    ),
}
"""Optional package -> commands that need it, each of which would make ``out``."""

# Where a library imports a package unasked, only one that is broken stops the command.
UNASKED = {"peft": (TRAIN, DEMO), "fvcore": (["profile", "llava-1.5-7b"],)}

CASES = [
    *((root, "missing", words) for root, commands in COMMANDS.items() for words in commands),
    *(
        (root, kind, words)
        for root, kind in itertools.product(COMMANDS, MODULES)
        for words in (*COMMANDS[root], *UNASKED.get(root, ()))
    ),
]


@pytest.fixture
def take_away(monkeypatch, tmp_path_factory):
    """Takes a package away, or puts a broken one before it; the real one is back afterwards."""
    saved = {}

    def take(root, kind):
        for name in [name for name in sys.modules if name.split(".")[0] == root]:
            saved[name] = sys.modules.pop(name)
        if kind == "missing":
            sys.modules[root] = None
            return None
        folder = tmp_path_factory.mktemp("fake") / root
        folder.mkdir()
        (folder / "__init__.py").write_text(MODULES[kind])
        monkeypatch.syspath_prepend(folder.parent)
        return folder

    yield take
    roots = {name.split(".")[0] for name in saved} | set(COMMANDS)
    for name in [name for name in sys.modules if name.split(".")[0] in roots and name not in saved]:
        if sys.modules[name] is None or "fake" in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    sys.modules.update(saved)


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    path, images = data.write_training_data(folder / "train", 2)
    return {"DATA": path, "IMAGES": images, "TABLE": data.write_heldout(folder / "table", 2)}


@pytest.mark.parametrize(
    ("root", "kind", "words"), CASES, ids=lambda value: str(value).split(",")[0].strip("['")
)
def test_one_line_at_the_start(root, kind, words, training, take_away, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = take_away(root, kind)
    code, out, err = run(capsys, *(training.get(word, word) for word in words))
    assert (code, out) == (2, "")
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in err
    name = root.replace("_", "-")
    if kind == "missing":
        assert f"error: {name} is not installed (pip install 'pmod-cli[" in line
    else:
        reason = {"empty": "ModuleNotFoundError", "ImportError": "cannot import name 'no_such_name'"}.get(
            kind, kind
        )
        assert line.startswith(f"error: {name} ")
        assert "is installed but cannot be imported: " in line
        assert reason in line
        assert line.endswith(f"({folder} is imported in its place: rename it)")
    assert not list(tmp_path.iterdir())


def test_a_run_outlives_a_broken_matplotlib(training, take_away, tmp_path, monkeypatch, capsys):
    """Its picture is an extra: the checkpoint is worth more."""
    monkeypatch.chdir(tmp_path)
    take_away("matplotlib", "AttributeError")
    small = [
        f"--set=train.{setting}" for setting in ("max_steps=1", "global_batch_size=2", "micro_batch_size=2")
    ]
    code, _, _ = run(capsys, *(training.get(word, word) for word in TRAIN), *small)
    assert code == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not (tmp_path / "out" / "training.png").exists()


@pytest.mark.parametrize(
    ("name", "value", "raised", "hint"),
    [
        (
            "TQDM_MININTERVAL",
            "x",
            ValueError("could not convert string to float: 'x'"),
            "unset TQDM_MININTERVAL",
        ),
        ("TORCH_LOGS", "y", ValueError("Invalid log settings: y, see TORCH_LOGS=help"), "unset TORCH_LOGS"),
        ("TORCH_LOGS", "y", ModuleNotFoundError("No module named 'y'"), "pmod doctor"),
        ("PYTORCH_ALLOC_CONF", "x", None, "unset it"),
        ("PYTORCH_ALLOC_CONF", "roundup_power2_divisions:[256:1,>:4],max_split_size_mb: 9", None, None),
    ],
)
def test_variables_that_break_an_import_are_named(name, value, raised, hint, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(PmodError, match=hint) if hint else nullcontext(), starting("generate"):
        if raised is not None:
            raise raised


def test_a_broken_file_of_matplotlibs_settings_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("matplotlibrc").write_bytes(b"font.size: 9  # \xe9")
    assert "working folder's matplotlibrc" in import_remedy(OPTIONAL["matplotlib"], "plot")
