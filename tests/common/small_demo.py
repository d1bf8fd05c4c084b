"""A small run of ``pmod demo``, shared by the tests that look at what it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from filelock import FileLock


def small_demo(base: Path) -> Path:
    """The output folder of a demo of two training steps and a few pictures, made once for all test processes.

    Args:
        base: A folder that all test processes share.
    """
    from pmod_cli.cli.app import result_of
    from pmod_cli.demo.job import DemoSettings, run_demo

    folder = base / "pmod-demo"
    with FileLock(f"{folder}.lock"):
        if not (folder / "report.json").exists():
            run_demo(folder, DemoSettings(train_images=16, heldout_images=12, steps=2), result_of, _ignore)
    return folder


def _ignore(line: Any) -> None:
    pass
