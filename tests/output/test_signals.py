"""Ctrl-C and SIGTERM, wherever they arrive."""

from __future__ import annotations

import os
import signal
import time

import pytest

from pmod_cli.output.console import report_error
from pmod_cli.output.signals import held, listening


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
