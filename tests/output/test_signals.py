"""Ctrl-C and SIGTERM, wherever they arrive."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pmod_cli.output.console import report_error
from pmod_cli.output.signals import held, listening

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_error_that_a_library_made_of_it_is_still_an_interrupt(capsys, number, code):
    with listening():
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        except KeyboardInterrupt:
            assert report_error(ValueError("not JSON")) == code
    assert capsys.readouterr().err == "error: interrupted; what was finished is kept\n"


def test_steps_that_belong_together_are_finished_first():
    done = []

    def work():
        with held():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("first")
            done.append("second")
        done.append("third")

    with listening(), pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["first", "second"]


def test_one_that_arrives_in_a_finalizer_is_not_lost(capsys):
    class Interrupted:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)

    def work():
        Interrupted()
        time.sleep(5)

    with listening(), pytest.raises(KeyboardInterrupt):
        work()
    assert capsys.readouterr().err == ""


def test_one_that_arrives_before_anything_has_begun_is_quiet(tmp_path):
    (tmp_path / "wrapt.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "pmod_cli", "--version"]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")
