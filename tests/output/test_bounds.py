"""A bound ends what takes too much, and leaves the process as it was."""

from __future__ import annotations

import itertools
import resource
import signal

import pytest

from pmod_cli.output.bounds import bounded


@pytest.fixture
def limits():
    def found():
        timer = signal.getitimer(signal.ITIMER_VIRTUAL)
        return resource.getrlimit(resource.RLIMIT_AS), timer, signal.getsignal(signal.SIGVTALRM)

    return found


def test_time(limits):
    before = limits()
    with pytest.raises(TimeoutError), bounded(seconds=0.05, gigabytes=1):
        any(number < 0 for number in itertools.count())
    assert limits() == before


def test_memory(limits):
    before = limits()
    with pytest.raises(MemoryError), bounded(seconds=5, gigabytes=0.5):
        bytes(2**30)
    assert limits() == before


def test_what_takes_little_goes_on(limits):
    before = limits()
    with bounded(seconds=5, gigabytes=0.5):
        assert limits() != before
    assert limits() == before
