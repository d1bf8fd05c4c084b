"""The parent's end: checks run in child processes, so that none of them takes the others down.

A chain is a list of checks that one child runs in turn, since importing torch anew for each would take too long. A
child that dies or hangs in a check is replaced by another, which goes on behind it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LIMIT = 30.0
"""Seconds that one check may take; on a network file system the first import of torch takes many."""

_FATAL = ("package torch", "package torchvision", "package transformers")
"""Where one of these kills or holds up the process, it would do the same to all that come after."""

_CODE = """
import json, sys
given = json.loads(sys.argv[1])
sys.path[:] = given["path"]
from pmod_cli.doctor.child import main
main(given["checks"])
"""


def run_chains(chains: Sequence[Sequence[str]], limit: float = LIMIT) -> dict[str, dict[str, Any]]:
    """Run chains of checks side by side.

    Args:
        chains: Names of `pmod_cli.doctor.checks.CHECKS`.
        limit: Seconds that one check may take.

    Returns:
        By name what `pmod_cli.doctor.checks.result` makes; ``broken`` too for a check that did not come back.
    """
    runs = [_Chain(chain, limit) for chain in chains]
    try:
        while sum(run.advance() for run in runs):  # not any(), which would stop at the first
            time.sleep(0.02)
    finally:
        for run in runs:
            run.stop()
    return {name: found for run in runs for name, found in run.found.items()}


class _Chain:
    """One chain and the child that runs it."""

    def __init__(self, names: Sequence[str], limit: float) -> None:
        self.left, self.limit = list(names), limit
        self.found: dict[str, dict[str, Any]] = {}
        self.child: subprocess.Popen[bytes] | None = None
        self._start()

    def advance(self) -> bool:
        """Look at what the child has written; whether there is something left to wait for."""
        if self.child is None:
            return False
        ended = self.child.poll()  # before reading: what it wrote last is then there
        self._read()
        if not self.left:
            self.stop()
        elif ended is not None:
            words = (
                f"the process died of signal {-ended}"
                if ended < 0
                else f"the process exited with code {ended}"
            )
            self._go_on(words + self._last_words())
        elif time.monotonic() - self.since > self.limit:
            self._go_on(f"did not finish within {self.limit:g} seconds")
        return bool(self.left)

    def stop(self) -> None:
        """End the child, and what it may have started."""
        if self.child is None:
            return
        if self.child.poll() is None:
            if hasattr(os, "killpg"):
                os.killpg(self.child.pid, signal.SIGKILL)
            else:
                self.child.kill()
            self.child.wait()
        self.child = None
        self.folder.cleanup()

    def _start(self) -> None:
        if not self.left:
            return
        # Files, not pipes: a grandchild that outlives the child would hold a pipe open. They have names because they
        # are read through handles of our own: one that we shared with the child would be moved under its feet.
        self.folder = tempfile.TemporaryDirectory(prefix="pmod-doctor-")
        given = json.dumps({"path": sys.path, "checks": self.left})
        with self._file("results").open("wb") as results, self._file("log").open("wb") as log:
            self.child = subprocess.Popen(
                [sys.executable, "-c", _CODE, given],
                stdin=subprocess.DEVNULL,
                stdout=results,
                stderr=log,
                start_new_session=True,
            )
        self.since, self.position, self.log_position = time.monotonic(), 0, 0

    def _file(self, name: str) -> Path:
        return Path(self.folder.name, name)

    def _read(self) -> None:
        for line in self._file("results").read_bytes()[self.position :].splitlines(keepends=True):
            if not line.endswith(b"\n"):
                return
            self.position += len(line)
            self.since = time.monotonic()
            told = json.loads(line)
            if "begun" in told:
                self.log_position = told["log"]
            else:
                name = told.pop("check")
                self.found[name] = told
                self.left.remove(name)

    def _go_on(self, words: str) -> None:
        """The first of what is left broke the child: say so, and begin anew behind it."""
        self.stop()
        name = self.left.pop(0)
        self.found[name] = _broken(words)
        if name in _FATAL:
            for other in self.left:
                self.found[other] = _broken(f"not tried: {name.split()[-1]} {words}")
            self.left = []
        self._start()

    def _last_words(self) -> str:
        log = self._file("log").read_bytes()[self.log_position :]
        lines = log.decode(errors="replace").strip().splitlines()
        return f": {lines[-1][:200]}" if lines else ""


def _broken(error: str) -> dict[str, Any]:
    return {"status": "broken", "error": error, "remedy": None, "facts": {}}
