"""What ``pmod doctor`` is made of: child processes that may do anything, declared versions, remedies."""

from __future__ import annotations

import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from pmod_cli import extras
from pmod_cli.doctor import commands, packages, probe
from pmod_cli.doctor.checks import attention
from pmod_cli.extras import OPTIONAL
from tests.common.tiny import tiny_model

BROKEN = {
    "fvcore": "import os, signal; print('noise', flush=True); os.kill(os.getpid(), signal.SIGSEGV)",
    "matplotlib": "import time; time.sleep(60)",
    "peft": "raise AttributeError('[bold]no such[/bold] thing')",
    "lmms_eval": "",
    "datasets": "print('on stdout'); raise SystemExit(3)",
    "tensorboard": "import os; os._exit(7)",
}


def fake(folder: Path, root: str, text: str) -> Path:
    (folder / root).mkdir(parents=True)
    (folder / root / "__init__.py").write_text(text)
    return folder


def metadata(folder: Path, name: str, number: str, *lines: str) -> Path:
    """Let a distribution seem to be installed, by what pip would leave of it."""
    place = folder / f"{name.replace('-', '_')}-{number}.dist-info"
    place.mkdir(parents=True)
    text = "\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {number}", *lines])
    (place / "METADATA").write_text(text)
    return folder


def test_every_kind_of_breakage_is_told_and_none_takes_the_others_down(tmp_path, monkeypatch):
    for root, text in BROKEN.items():
        fake(tmp_path, root, text)
    monkeypatch.syspath_prepend(tmp_path)
    # No torch in this chain: a limit of two seconds is then long enough for what works, also on a busy machine.
    names = [f"package {root}" for root in BROKEN]
    found = probe.run_chains([names[:3], names[3:]], limit=2)
    assert {name.split()[1]: result["status"] for name, result in found.items()} == dict.fromkeys(
        BROKEN, "broken"
    )
    errors = {name.split()[1]: result["error"] for name, result in found.items()}
    assert errors == {
        "fvcore": "the process died of signal 11: noise",
        "matplotlib": "did not finish within 2 seconds",
        "peft": "AttributeError: [bold]no such[/bold] thing",
        "lmms_eval": "ModuleNotFoundError: No module named 'lmms_eval.evaluator'",
        "datasets": "SystemExit: 3",
        "tensorboard": "the process exited with code 7",
    }


def test_what_hangs_leaves_no_process(tmp_path, monkeypatch):
    pid = tmp_path / "pid"
    start = "import subprocess, sys, time\n"
    start += "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    fake(tmp_path, "fvcore", f"{start}open({str(pid)!r}, 'w').write(str(child.pid))\ntime.sleep(60)")
    monkeypatch.syspath_prepend(tmp_path)
    found = probe.run_chains([["package fvcore"]], limit=2)
    assert found["package fvcore"]["error"] == "did not finish within 2 seconds"
    state = Path(f"/proc/{pid.read_text()}/stat")
    if Path("/proc").is_dir():
        deadline = time.monotonic() + 10  # it is told to die, and does so when it is its turn
        while alive(state) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not alive(state)


def alive(state: Path) -> bool:
    """Whether a process still runs; in a container nobody may have reaped a dead one yet."""
    try:
        return state.read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_a_torch_that_kills_the_process_is_tried_once(tmp_path, monkeypatch):
    fake(tmp_path, "torch", "import os; os._exit(9)")
    monkeypatch.syspath_prepend(tmp_path)
    found = probe.run_chains([["package torch", "package transformers", "command convert"]])
    assert [result["error"] for result in found.values()] == [
        "the process exited with code 9",
        "not tried: torch the process exited with code 9",
        "not tried: torch the process exited with code 9",
    ]


WORKS = {"status": "works", "error": None, "remedy": None}
MISSING = {"status": "missing", "error": "not installed", "remedy": "pip install 'pmod-cli[x]'"}
BAD = {"status": "broken", "error": "why", "remedy": "mend it"}


def verdict(verb, **changes):
    names = [f"package {root}" for root in packages.PACKAGES] + [
        f"command {name}" for name in commands.COMMANDS
    ]
    found = dict.fromkeys(names, WORKS) | {f"package {root}": result for root, result in changes.items()}
    return commands.verdict(commands.COMMANDS[verb], found)


@pytest.mark.parametrize("verb", commands.COMMANDS)
def test_a_verb_works_where_all_does_and_not_without_torch(verb):
    assert verdict(verb)["works"]
    assert not verdict(verb, torch=BAD)["works"]
    assert verdict(verb, torch=MISSING)["reason"] == "torch is not installed"


def test_what_a_verb_needs_uses_and_does_without():
    told = verdict("eval", lmms_eval=MISSING)
    assert (told["works"], told["reason"]) == (False, "lmms-eval is not installed")
    assert told["remedy"] == "pip install 'pmod-cli[x]'"
    assert verdict("demo", fvcore=MISSING)["remedy"] == "pip install 'pmod-cli[all]'"
    assert verdict("demo", fvcore=BAD)["remedy"] == "mend it"
    assert verdict("generate", lmms_eval=BAD, peft=BAD, matplotlib=BAD)["works"]
    told = verdict("profile", fvcore=MISSING)
    assert told["works"]
    [limit] = told["limits"]
    assert limit["what"] == "counts by formula (fvcore is not installed)"
    assert not verdict("profile", fvcore=BAD)["works"]
    assert not verdict("finetune", peft=BAD)["works"]
    [limit] = verdict("finetune", datasets=MISSING)["limits"]
    assert limit["remedy"] == "pip install 'pmod-cli[train]'"


def test_versions_outside_the_declared_bounds(tmp_path, monkeypatch):
    lines = (
        "Provides-Extra: eval",
        f"Requires-Dist: pillow<={version('pillow')},>=1",
        "Requires-Dist: numpy<1",
        "Requires-Dist: no-such-package<1",
        "Requires-Dist: pyyaml<1; python_version < '3'",
        "Requires-Dist: filelock<4,>=3.20; extra == 'eval'",
        "Requires-Dist: pytest<1; extra == 'dev'",
    )
    metadata(tmp_path, "pmod-cli", "9.9", *lines)
    metadata(tmp_path, "filelock", "4.3.1")
    monkeypatch.syspath_prepend(tmp_path)
    found = {outside.name: outside for outside in extras.outside()}
    assert list(found) == ["numpy", "filelock"]
    assert found["numpy"].remedy == "pip install --upgrade pmod-cli"
    assert found["filelock"] == extras.Outside(
        "filelock", "4.3.1", "<4,>=3.20", "pip install --upgrade 'pmod-cli[eval]'"
    )
    assert [outside.name for outside in extras.outside([None])] == ["numpy"]
    assert extras.requirement_of("filelock") == "filelock<4,>=3.20"


def test_a_dependency_that_does_not_fit_is_named_with_its_remedy(tmp_path):
    """lmms-eval, whole, beside a filelock 4: the import that fails is inside a function that an evaluation calls."""
    metadata(tmp_path, "pmod-cli", "9.9", "Requires-Dist: filelock<4,>=3.20; extra == 'eval'")
    metadata(tmp_path, "filelock", "4.3.1")
    fake(
        tmp_path,
        "filelock",
        "class FileLock: pass\nclass BaseFileLock: pass\nclass Timeout(Exception): pass\n",
    )
    fake(tmp_path, "lmms_eval", "")
    (tmp_path / "lmms_eval" / "models.py").touch()
    (tmp_path / "lmms_eval" / "tasks.py").touch()
    (tmp_path / "lmms_eval" / "evaluator.py").write_text(
        "def _enable_reentrant_filelocks():\n    import filelock._api\n"
    )
    metadata(tmp_path, "lmms-eval", "0.7.3")
    code = "from pmod_cli.extras import require; require('lmms_eval')"
    path = [str(tmp_path), *filter(None, sys.path)]
    program = f"import sys; sys.path[:] = {path!r}\n{code}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr.strip().splitlines()[-1].split("Error: ", 1)[1] == (
        "lmms-eval 0.7.3 is installed but cannot be imported: ModuleNotFoundError: No module named 'filelock._api' "
        "(filelock 4.3.1 is installed, <4,>=3.20 is wanted: pip install --upgrade 'pmod-cli[eval]')"
    )


def test_torch_and_torchvision_of_this_environment_are_a_pair():
    assert packages.pair_problem() is None
    assert f"'torch=={version('torch').split('+')[0]}' torchvision" in str(packages.pair_remedy())


def test_another_torch_than_torchvisions_is_told(monkeypatch):
    import torch

    monkeypatch.setattr(torch, "__version__", "2.1.0")
    assert "does not go with torch 2.1.0: it wants torch " in str(packages.pair_problem())
    monkeypatch.undo()
    monkeypatch.setattr("torchvision.version.cuda", 12040)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    assert "built for CUDA 12, the other for CUDA 13.0" in str(packages.pair_problem())


def test_attention_is_what_a_pmod_model_really_gets():
    told = attention()
    assert told["why"]
    assert told["implementation"] == tiny_model().config.text_config._attn_implementation == "pmod_sdpa"


def test_every_optional_package_is_of_a_real_extra():
    assert {package.extra for package in OPTIONAL.values()} <= set(extras.EXTRAS)
