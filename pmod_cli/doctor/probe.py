"""Checks run in child processes, so that none of them takes the others down: an import can crash, exit or hang.

A chain is a list of checks that one child runs in turn, since importing torch anew for each would take too long. A
child that dies or hangs in a check is replaced by another, which goes on with the check after it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pmod_cli.doctor.checks import CHECKS, result
from pmod_cli.extras import reason

LIMIT = 30.0
"""Seconds that one check may take; on a network file system the first import of torch takes many."""

_FATAL = ("package torch", "package torchvision", "package transformers")
"""Where one of these kills or holds up the process, it would do the same to all that come after."""

_MARK = b"\x1e"
"""Stands in a child's log where a check begins."""

_CODE = """
import json, sys
given = json.loads(sys.argv[1])
sys.path[:] = given["path"]
from pmod_cli.doctor.probe import run_checks
run_checks(given["checks"])
"""


def run_chains(chains: Sequence[Sequence[str]], limit: float = LIMIT) -> dict[str, dict[str, Any]]:
    """Run chains of checks (see `CHECKS`) side by side, each check for at most ``limit`` seconds.

    Returns:
        By name what `pmod_cli.doctor.checks.result` makes; ``broken`` too for a check that did not come back.
    """
    interrupted = threading.Event()
    with ThreadPoolExecutor(len(chains)) as pool:
        runs = [pool.submit(_run_chain, chain, limit, interrupted) for chain in chains]
        try:
            results = [run.result() for run in runs]
        finally:
            interrupted.set()  # Ctrl-C: no child outlives this process
    return {name: found for part in results for name, found in part.items()}


def run_checks(names: Sequence[str]) -> None:
    """Run checks (see `CHECKS`) and end the process: the child's side."""
    # What an import prints, from C too, must not get among the results.
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    print(file=results, flush=True)  # ready: the first check's time counts from here
    for name in names:
        sys.stderr.flush()
        os.write(2, _MARK)
        try:
            found = CHECKS[name]()
        except (Exception, SystemExit) as error:
            found = result("broken", error=reason(error), remedy="see the packages above")
        print(json.dumps(found), file=results, flush=True)
    sys.stderr.flush()
    os._exit(0)  # torch takes its time to be taken down, and somebody's exit handlers could hang


def _run_chain(names: Sequence[str], limit: float, interrupted: threading.Event) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    left = list(names)
    while left and not interrupted.is_set():
        results, problem = _run_child(left, limit, interrupted)
        found |= zip(left, results, strict=False)
        left = left[len(results) :]
        if left:
            broke, *left = left
            found[broke] = result("broken", error=problem)
            if broke in _FATAL:
                untried = f"not tried: {broke.split()[-1]} {problem}"
                return found | {name: result("broken", error=untried) for name in left}
    return found


def _run_child(
    names: Sequence[str], limit: float, interrupted: threading.Event
) -> tuple[list[dict[str, Any]], str]:
    """Run checks in one child until it ends, or hangs in one of them.

    Returns:
        The results of those that it finished, and what became of it in the next one.
    """
    # Files, not pipes: a grandchild that outlives the child would hold a pipe open. They are read through handles of
    # our own: one that we shared with the child would be moved under its feet.
    with tempfile.TemporaryDirectory(prefix="pmod-doctor-") as folder:
        output, log = Path(folder, "results"), Path(folder, "log")
        given = json.dumps({"path": sys.path, "checks": list(names)})
        with output.open("wb") as stdout, log.open("wb") as stderr:
            child = subprocess.Popen(
                [sys.executable, "-c", _CODE, given],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        lines, since = 0, time.monotonic()
        try:
            while child.poll() is None and time.monotonic() - since <= limit:
                if interrupted.wait(0.02):
                    break
                if (now := output.read_bytes().count(b"\n")) > lines:
                    lines, since = now, time.monotonic()
            ended = child.returncode
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)  # and what it may have started
                child.wait()
        whole = output.read_bytes().rpartition(b"\n")[0]
        results = [json.loads(line) for line in whole.splitlines() if line]
        if ended is None:
            return results, f"did not finish within {limit:g} seconds"
        how = f"died of signal {-ended}" if ended < 0 else f"exited with code {ended}"
        last = log.read_bytes().rpartition(_MARK)[2].decode(errors="replace").strip().splitlines()
        return results, f"the process {how}" + (f": {last[-1][:200]}" if last else "")
