"""The samples that turned out to be bad while a run went on, of all its processes."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path

from pmod_cli.output.errors import GateError

_log = logging.getLogger(__name__)


class BadSampleLog:
    """A file of JSON lines to which every process appends, so that all count alike and a resumed run goes on.

    Args:
        path: The file; it need not exist.
        limit: More bad samples than this stop the run.
        known: id -> reason of those that were bad from the start; they count too.
    """

    def __init__(self, path: Path, limit: int, known: dict[str, str] | None = None) -> None:
        self.path, self.limit = path, limit
        self.samples = dict(known or {})
        self._read = 0

    def add(self, replaced: Iterable[tuple[str, str]]) -> None:
        """Count samples that were replaced: (id, reason) each.

        Raises:
            GateError: There are now more than the limit, those of other processes included.
        """
        self._catch_up()
        for name, reason in replaced:
            if name not in self.samples:
                self.samples[name] = reason
                _log.warning("sample %s replaced: %s", name, reason)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([name, reason]) + "\n")
        if len(self.samples) > self.limit:
            name, reason = next(reversed(self.samples.items()))
            raise GateError(
                f"{len(self.samples)} bad samples, more than train.max_bad_samples={self.limit}; "
                f"the last: {name}: {reason}",
                "clean the data with pmod data check --fix, or raise the limit and go on with --resume",
            )

    def all(self) -> dict[str, str]:
        """Id -> reason, those of other processes included."""
        self._catch_up()
        return dict(self.samples)

    def _catch_up(self) -> None:
        if not self.path.exists() or self.path.stat().st_size == self._read:
            return
        content = self.path.read_bytes()
        self._read = len(content)
        for line in content.decode("utf-8").splitlines():
            try:
                name, reason = json.loads(line)
            except ValueError:
                continue  # cut off by a kill
            self.samples.setdefault(name, reason)
