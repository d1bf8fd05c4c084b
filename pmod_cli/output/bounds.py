"""A bound on what a stranger's template may take while it runs."""

from __future__ import annotations

import contextlib
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_STATM = Path("/proc/self/statm")


@contextlib.contextmanager
def bounded(seconds: float, gigabytes: float) -> Iterator[None]:
    """While it lasts, so much processor time and so much more memory, on the main thread of a Linux process.

    Elsewhere there is no bound: a limit is the whole process's, and threads at work would meet it.

    Raises:
        TimeoutError: It took longer.
        MemoryError: It took more.
    """
    if threading.current_thread() is not threading.main_thread() or not _STATM.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(_STATM.read_text().split()[0]) * resource.getpagesize()
    most = taken + int(gigabytes * 2**30)
    before = signal.signal(signal.SIGVTALRM, _stop)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (most if soft < 0 else min(soft, most), hard))
        # Not SIGALRM, which other programs wait with; and a busy machine takes nothing of this time.
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGVTALRM, before)


def _stop(*_: Any) -> None:
    raise TimeoutError("it takes too long")
