"""Kills conversions at every step on the way and reports what is left; run by ``test_atomic.py``.

A step is a file opened for writing, a folder made, a link, a rename, a removal: whatever Python's audit hooks see.
Each conversion is a forked child that kills itself with SIGKILL at its N-th step, for N = 1, 2, ... until one ends by
itself.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from pmod_cli.conversion.convert import convert
from pmod_cli.conversion.plan import plan_conversion
from pmod_cli.recipe import default_recipe

STEPS = ("os.mkdir", "os.link", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "ctypes.dlsym")


def child(plan: Any, destination: Path, fatal: int) -> None:
    """Convert, and die at step number ``fatal``."""
    step = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal step
        writes = (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if writes or event in STEPS:
            step += 1
            if step == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    convert(plan, destination, force=True)
    os._exit(0)


def main() -> None:
    """Print one JSON row a kill: the signal or 0, and what is found at the destination and beside it."""
    source, folder, existing = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "existing"
    plan = plan_conversion(source, recipe=default_recipe(["mod.floor=0.3"]))
    convert(plan, folder / "whole")  # imports for all children what it needs
    gc.freeze()  # and leaves them nothing to search for garbage
    rows = []
    for fatal in range(1, 500):
        place = folder / f"kill{fatal}"
        place.mkdir()
        destination = place / "pmod"
        if existing:
            shutil.copytree(folder / "before", destination)
        pid = os.fork()
        if not pid:
            try:
                child(plan, destination, fatal)
            finally:
                os._exit(9)
        status = os.waitpid(pid, 0)[1]
        rows.append({"signal": os.WTERMSIG(status), "exit": os.WEXITSTATUS(status), "place": str(place)})
        if not os.WIFSIGNALED(status):
            break
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
