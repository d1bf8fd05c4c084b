"""What all commands share: pipes, widths, errors of the system as one line."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pmod_cli.cli import main
from pmod_cli.output.console import report_error
from pmod_cli.output.errors import GateError, PmodError


@pytest.mark.parametrize("options", ["", "--json"])
def test_a_reader_that_goes_away_is_no_error(options):
    # Formula counts load neither torch nor transformers.
    command = f"{sys.executable} -m pmod_cli profile llava-1.5-7b --counter formula {options}"
    script = f"{command} 2>/dev/null | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("options", ["", "--json", "--markdown"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_stdout_is_one_line_and_exit_2(options, unbuffered):
    command = f"{sys.executable} -m pmod_cli profile llava-1.5-7b --counter formula {options} > /dev/full"
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: No space left on device")
    assert done.stderr.count("\n") == 1


def test_half_of_a_result_is_no_success(tmp_path):
    # The first kilobytes get through, as on a nearly full disk; unbuffered, Python would not say that the rest did not.
    command = f"{sys.executable} -m pmod_cli profile llava-1.5-7b --counter formula --json > {tmp_path / 'out.json'}"
    done = subprocess.run(
        ["bash", "-c", f"ulimit -f 4; trap '' XFSZ; {command}"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: File too large")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (PmodError("no such thing", "make one"), 2, "error: no such thing (make one)"),
        (GateError("too slow"), 1, "error: too slow"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (OSError(errno.ENOSPC, "x", "out"), 2, "error: No space left on device (out): free some space"),
        (OSError(errno.EACCES, "x", "out"), 2, "error: Permission denied (out): choose a place"),
        (RuntimeError("can't start new thread"), 2, "error: no further thread or process can be started"),
        (ValueError(f"Arrow: {os.strerror(errno.EAGAIN)}"), 2, "error: no further thread or process"),
        (PmodError("two\nlines"), 2, "error: two lines"),
    ],
)
def test_errors_are_one_line(error, code, line, capsys):
    assert report_error(error) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(line)
    assert err.count("\n") == 1


def test_an_unforeseen_error_is_a_line_and_its_traceback_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for debug in (False, True):
        assert report_error(TypeError("ours\x1b[31m"), debug) == 2
    [kept] = tmp_path.iterdir()
    assert "TypeError: ours" in kept.read_text(encoding="utf-8").splitlines()[-1]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(
        "error: TypeError: ours\\x1b[31m (unforeseen; the traceback is in " + str(kept)
    )
    assert lines[1].startswith("TypeError: ours")
    assert sum(line.startswith("error: ") for line in lines) == 2


def test_help_needs_no_torch():
    script = (
        "import sys; from pmod_cli.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    for verb in (
        "demo",
        "convert",
        "inspect",
        "finetune",
        "data",
        "profile",
        "generate",
        "eval",
        "visualize",
    ):
        assert verb in done.stdout


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("convert --forse", "error: No such option: --forse"),
        ("convert", "error: Missing argument"),
        ("profile llava-1.5-7b --batch x", "error: Invalid value for '--batch'"),
        ("nonsense", "error: No such command 'nonsense'"),
        ("generate x", "error: Missing option '--prompt'"),
    ],
)
def test_a_wrong_command_line_is_one_line(words, line, capsys):
    with pytest.raises(SystemExit) as exit_code:
        main(words.split())
    out, err = capsys.readouterr()
    assert exit_code.value.code == 2
    assert out == ""
    assert err.startswith(line)
    assert "--help" in err
    assert err.count("\n") == 1


def test_no_arguments_show_help(capsys):
    with pytest.raises(SystemExit) as exit_code:
        main([])
    assert exit_code.value.code == 2
    assert "convert" in "".join(capsys.readouterr())
