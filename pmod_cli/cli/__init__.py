"""The ``pmod`` command: one file a verb, registered here.

Nothing in this package imports torch or transformers at module level: ``pmod --help`` has to answer at once.
"""

from __future__ import annotations

from pmod_cli.cli.app import app, main

# The order of registration is the order in ``pmod --help``: the order in which the verbs are used.
for _verb in (
    "demo",
    "doctor",
    "convert",
    "inspect",
    "finetune",
    "data",
    "profile",
    "generate",
    "eval",
    "visualize",
    "report",
):
    __import__(f"pmod_cli.cli.{_verb}")

__all__ = ["app", "main"]
