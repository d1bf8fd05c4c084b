"""Ctrl-C and SIGTERM: both end a command in one line, with nothing half done left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

_STOPS = (signal.SIGINT, signal.SIGTERM)


class _State:
    arrived: int | None = None
    count = depth = 0


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """While it lasts, SIGTERM raises `KeyboardInterrupt` as Ctrl-C does, and `arrived` tells of it."""
    _State.arrived, _State.depth = None, 0
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _stop) for number in _STOPS}
    hook = sys.unraisablehook

    def lost(what: Any) -> None:
        """Python drops what is raised in a finalizer or a callback: ask again, outside it."""
        if isinstance(what.exc_value, KeyboardInterrupt) and _State.arrived is not None:
            threading.Timer(0.01, os.kill, (os.getpid(), _State.arrived)).start()
        else:
            hook(what)

    sys.unraisablehook = lost
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)
        _State.arrived = None


@contextlib.contextmanager
def held() -> Iterator[None]:
    """A few steps that belong together: a signal that arrives in the middle acts after the last of them."""
    earlier = _State.count
    _State.depth += 1
    try:
        yield
    finally:
        _State.depth -= 1
        if not _State.depth and _State.count != earlier:
            raise KeyboardInterrupt


def arrived() -> int | None:
    """The signal that ends this command, if one came: libraries may have turned it into an error of their own."""
    return _State.arrived


def _stop(number: int, frame: Any) -> None:
    _State.arrived = number
    _State.count += 1
    if not _State.depth:
        raise KeyboardInterrupt
