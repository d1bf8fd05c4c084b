"""The output folder of an evaluation: what is in it, and how it is written without losing anything.

- ``results.json``, ``report.md``: replaced after each task, so they are there for whatever is finished.
- ``samples/TASK.jsonl``: every document with both models' answers and scores.
- ``answers/KEY/TASK/``: what `AnswerStore` keeps; a rerun reads it.
- ``submissions/``, ``lmms-eval.log``: files that tasks write for a leaderboard, and what they print.

Without an output folder the answers alone are kept, in the user's cache (`answers_cache`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pmod_cli.evaluation.results import EvalResult
from pmod_cli.evaluation.store import AnswerStore
from pmod_cli.evaluation.tables import markdown
from pmod_cli.output.errors import PmodError
from pmod_cli.output.files import read_json, tag, write_file, write_json


def answers_cache() -> Path:
    """Where answers are kept if there is no output folder: below ``PMOD_CACHE``, or the user's cache."""
    named = os.environ.get("PMOD_CACHE")
    if named:
        return Path(named).expanduser() / "answers"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pmod" / "answers"


class OutputFolder:
    """One evaluation's folder; made if missing.

    Args:
        path: The folder.
        answers: Where answers are kept; in the folder itself if not given.
    """

    def __init__(self, path: Path, answers: Path | None = None) -> None:
        self.path = path
        self.answers = answers or path / "answers"
        (path / "samples").mkdir(parents=True, exist_ok=True)

    def claim(self, models: Mapping[str, Mapping[str, Any]]) -> None:
        """Make sure that the folder does not hold the results of other models.

        Args:
            models: Description by role, each with a ``fingerprint``.

        Raises:
            PmodError: If it does.
        """
        try:
            previous = read_json(self.path / "results.json")
        except PmodError:
            return
        for role in ("model", "baseline"):
            before = (previous.get(role) or {}).get("fingerprint")
            now = models.get(role, {}).get("fingerprint")
            if before and now and before != now:
                raise PmodError(
                    f"{self.path} holds the results of another {role}", "choose another --output, or --force"
                )

    def store(self, key: str, task: str, rank: int, fresh: bool = False, processes: int = 1) -> AnswerStore:
        """The answers kept under a key.

        Args:
            key: Digest of all that an answer depends on.
            task: Name of the task.
            rank: This process's rank; each writes a file of its own.
            fresh: Forget what was kept.
            processes: How many there are.
        """
        folder = self.answers / key[:16] / task
        return AnswerStore(folder, rank, fresh, processes)

    def write_samples(self, task: str, runs: Mapping[str, Sequence[dict[str, Any]]]) -> None:
        """Write a task's samples, one line per document.

        Args:
            task: Name of the task.
            runs: By role, the samples with their scores; a document of one role has its like in the others.
        """
        lines = []
        for samples in zip(*runs.values(), strict=True):
            shared = {key: samples[0][key] for key in ("doc_id", "prompt", "target", "doc")}
            own = {
                role: {key: sample[key] for key in ("answer", "score", "error", "tokens")}
                for role, sample in zip(runs, samples, strict=True)
            }
            lines.append(json.dumps(shared | own, default=str))
        write_file(self.path / "samples" / f"{task}.jsonl", "\n".join(lines) + "\n")

    def write_results(self, result: EvalResult) -> None:
        """Write ``results.json`` and ``report.md``."""
        write_json(self.path / "results.json", tag("eval") | result.to_dict())
        write_file(self.path / "report.md", markdown(result))
