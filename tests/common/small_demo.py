"""A small run of ``pmod demo``, shared by the tests that look at what it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from filelock import FileLock

SIZE = {"train_images": 8, "heldout_images": 12, "steps": 2}
ARGUMENTS = [word for name, value in SIZE.items() for word in (f"--{name.replace('_', '-')}", str(value))]
"""What ``pmod demo`` takes to find this run's steps finished."""


def small_demo(base: Path) -> Path:
    """The output folder of a demo of two training steps and a few pictures, made once for all test processes.

    Args:
        base: A folder that all test processes share.
    """
    from pmod_cli.demo.job import DemoSettings, run_demo

    folder = base / "pmod-demo"
    with FileLock(f"{folder}.lock"):
        if not (folder / "report.json").exists():
            run_demo(folder, DemoSettings(**SIZE), _ignore)
    return folder


def _ignore(line: Any) -> None:
    pass
