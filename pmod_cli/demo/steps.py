"""Run the demo's steps once: what is finished is kept, and reused as long as nothing before it changed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pmod_cli import __version__


class Steps:
    """The finished steps of one output folder.

    Each step has a file ``steps/NAME.json`` with its result, its wall time and a digest of all that it depends
    on: its own arguments, the steps it builds on, and the version of pmod.

    Args:
        folder: The demo's output folder.
        announce: Called with a line of text before each step.
    """

    def __init__(self, folder: Path, announce: Callable[[str], None]) -> None:
        self.folder = folder / "steps"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.announce = announce
        self.seconds: dict[str, float] = {}
        self._digests: dict[str, str] = {}

    def run(self, name: str, key: Any, action: Callable[[], Any], needs: Sequence[str] = ()) -> Any:
        """The result of a step, from its file if it is finished.

        Args:
            name: Of the step; a file name.
            key: Its arguments, in what JSON can write.
            action: Does the work and returns what JSON can write.
            needs: Steps that it builds on, run before.
        """
        parts = [__version__, key, [self._digests[need] for need in needs]]
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
        self._digests[name] = digest
        path = self.folder / f"{name}.json"
        finished = _read(path)
        if finished is not None and finished["digest"] == digest:
            self.announce(f"[dim]{name}: finished before, reused[/dim]")
            self.seconds[name] = finished["seconds"]
            return finished["result"]
        started = time.perf_counter()
        result = action()
        self.seconds[name] = time.perf_counter() - started
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"digest": digest, "seconds": self.seconds[name], "result": result}))
        temporary.replace(path)
        return result

    def command(
        self, name: str, arguments: Sequence[str | Path], needs: Sequence[str] = ()
    ) -> dict[str, Any]:
        """The result of a public command, run in this process as ``pmod ARGUMENTS --json``."""
        words = [str(argument) for argument in arguments]

        def call() -> dict[str, Any]:
            self.announce(f"[bold cyan]$ pmod {shlex.join(words)}[/bold cyan]")
            return run_command(words)

        return self.run(name, words, call, needs)


def run_command(words: Sequence[str]) -> dict[str, Any]:
    """Run ``pmod WORDS --json`` in this process and return the result it prints.

    Raises:
        PmodError: Whatever the command raises.
    """
    from pmod_cli.cli import app

    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        app(args=[*words, "--json"], prog_name="pmod", standalone_mode=False)
    return json.loads(output.getvalue())["result"]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
