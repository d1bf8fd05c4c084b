"""Run each step of the demo once: what is finished is kept, and reused as long as nothing before it changed."""

from __future__ import annotations

import hashlib
import json
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pmod_cli import __version__
from pmod_cli.output.errors import PmodError
from pmod_cli.output.files import read_json, tag, write_json


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

    def run(
        self, name: str, key: Any, action: Callable[[], Any], needs: Sequence[str] = (), command: str = "demo"
    ) -> Any:
        """The result of a step, from its file if it is finished.

        Args:
            name: Of the step; a file name.
            key: Its arguments, in what JSON can write.
            action: Does the work and returns what JSON can write.
            needs: Steps that it builds on, run before.
            command: Whose result it is; `pmod report` reads it.
        """
        parts = [__version__, command, key, [self._digests[need] for need in needs]]
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
        self._digests[name] = digest
        path = self.folder / f"{name}.json"
        try:
            finished = read_json(path)
        except PmodError:
            finished = {}
        if finished.get("digest") == digest:
            self.announce(f"[dim]{name}: finished before, reused[/dim]")
            self.seconds[name] = finished["seconds"]
            return finished["result"]
        started = time.perf_counter()
        result = action()
        self.seconds[name] = time.perf_counter() - started
        known = {"digest": digest, "seconds": self.seconds[name]}
        write_json(path, tag(command) | known | {"result": result})
        return json.loads(json.dumps(result))  # as the next run will read it: no tuples, no integer keys

    def command(
        self, name: str, words: Sequence[str | Path], action: Callable[[], Any], needs: Sequence[str] = ()
    ) -> Any:
        """The result of a step that does what a public command does.

        Args:
            name: See `run`.
            words: The command that a user would type, without ``pmod``; shown before the step.
            action: See `run`.
            needs: See `run`.
        """
        typed = [str(word) for word in words]

        def announced() -> Any:
            self.announce(f"[bold cyan]$ pmod {shlex.join(typed)}[/bold cyan]")
            return action()

        return self.run(name, typed, announced, needs, command=typed[0])
