"""The ``pmod`` program: one file per command, registered here.

Nothing in this package imports torch or transformers at module level: ``pmod --help`` has to answer at once.
"""

from __future__ import annotations

from pmod_cli.cli.app import app, main

# The order of registration is the order in ``pmod --help``: the order in which the commands are used.
for _command in (
    "demo",
    "doctor",
    "convert",
    "inspect",
    "calibrate",
    "finetune",
    "data",
    "profile",
    "generate",
    "serve",
    "eval",
    "visualize",
    "report",
):
    __import__(f"pmod_cli.cli.{_command}")

__all__ = ["app", "main"]
