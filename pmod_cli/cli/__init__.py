"""The ``pmod`` command: one file a verb, registered here.

Nothing in this package imports torch or transformers at module level: ``pmod --help`` has to answer at once.
"""

from __future__ import annotations

from pmod_cli.cli.app import main

__all__ = ["main"]
