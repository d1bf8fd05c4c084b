"""The output folder of an evaluation: what is in it, and how it is written without losing anything.

- ``results.json``, ``report.md``: replaced after each task, so they are there for whatever is finished.
- ``samples/TASK.jsonl``: every document with both models' answers and scores.
- ``answers/KEY/TASK/``: what `AnswerStore` keeps; a rerun reads it.
- ``submissions/``, ``lmms-eval.log``: files that tasks write for a leaderboard, and what they print.

Without an output folder the answers alone are kept, in the user's cache (`answers_cache`).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pmod_cli.evaluation.results import EvalResult
from pmod_cli.evaluation.tables import markdown
from pmod_cli.generation import Answer
from pmod_cli.output.errors import PmodError
from pmod_cli.output.files import tag, write_file, write_json
from pmod_cli.output.marks import TAG
from pmod_cli.output.paths import cache_folder
from pmod_cli.output.reading import read_json, read_json_lines

PICTURES = "pictures"
"""What `pmod eval --diff` adds."""
HOLDS = ("results.json", "report.md", "samples", "answers", "submissions", PICTURES, "*.log")


def answers_cache() -> Path:
    """Where answers are kept if there is no output folder."""
    return cache_folder() / "answers"


def claim(folder: Path, models: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse an output folder with the results of other models than these, described by role with a ``fingerprint``."""
    path = folder / "results.json"
    previous = read_json(path) if path.is_file() else {}
    for role, described in models.items():
        before, now = (previous.get(role) or {}).get("fingerprint"), described["fingerprint"]
        if before and now and before != now:
            raise PmodError(
                f"{folder} holds the results of another {role}", "choose another --output, or --force"
            )


def write_samples(folder: Path, task: str, samples: Mapping[str, Sequence[dict[str, Any]]]) -> None:
    """Write a task's samples, by role, one line per document; all roles have the same documents."""
    lines = []
    for sides in zip(*samples.values(), strict=True):
        shared = {key: sides[0][key] for key in ("doc_id", "prompt", "target", "doc")}
        own = {
            role: {key: side[key] for key in ("answer", "score", "error", "tokens")}
            for role, side in zip(samples, sides, strict=True)
        }
        lines.append(json.dumps(shared | own, default=str) + "\n")
    path = folder / "samples"
    path.mkdir(exist_ok=True)
    write_file(path / f"{task}.jsonl", "".join(lines))


def write_results(folder: Path, result: EvalResult) -> None:
    """Write ``results.json`` and ``report.md``."""
    write_json(folder / "results.json", tag("eval") | result.to_dict())
    write_file(folder / "report.md", f"{markdown(result)}\n<!-- {TAG} -->\n")


class AnswerStore:
    """The answers of one model to one task, as JSON lines; every process writes its own file and reads all.

    Batch by batch, so that a killed evaluation goes on where it stopped. Whoever makes the folder's name has to put
    into it all that an answer depends on but the prompt (checkpoint, task version, generation settings, data).

    Args:
        folder: Where the files are; made if missing.
        rank: This process's rank.
        fresh: Forget what was kept.
        processes: How many there are; when something is forgotten, each sees to the files of a share of the ranks,
            because there may have been more processes before.
    """

    def __init__(self, folder: Path, rank: int = 0, fresh: bool = False, processes: int = 1) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._answers: dict[tuple[int, str], Answer] = {}
        self._documents: set[int] = set()
        self._path = folder / f"rank{rank}.jsonl"
        for path in sorted(folder.glob("rank*.jsonl")):
            if not fresh:
                self._read(path)
            elif int(path.stem.removeprefix("rank")) % processes == rank:
                path.unlink()

    def __len__(self) -> int:
        return len(self._answers)

    def knows(self, doc_id: int) -> bool:
        """Whether there is any answer for a document: only then its prompt is worth making to look it up."""
        return doc_id in self._documents

    def get(self, doc_id: int, prompt: str) -> Answer | None:
        """The stored answer to a document's prompt, by the prompt's digest; or None."""
        return self._answers.get((doc_id, prompt))

    def add(self, answers: Iterable[tuple[int, str, Answer]]) -> None:
        """Store a batch's answers, with document and prompt's digest; when this returns they are on the disk."""
        lines = []
        for doc_id, prompt, answer in answers:
            self._keep(doc_id, prompt, answer)
            line = {"doc_id": doc_id, "prompt": prompt, "answer": answer.text}
            line |= {"prompt_tokens": answer.prompt_tokens, "new_tokens": answer.new_tokens}
            lines.append(json.dumps(line) + "\n")
        if not lines:
            return
        with self._path.open("a+b") as file:
            size = file.tell()
            if size and os.pread(file.fileno(), 1, size - 1) != b"\n":  # a kill cut the last line off
                file.write(b"\n")
            file.write("".join(lines).encode())
            file.flush()
            os.fsync(file.fileno())

    def _read(self, path: Path) -> None:
        for entry in read_json_lines(path):
            with contextlib.suppress(KeyError, TypeError):  # a line that is not ours
                answer = Answer(entry["answer"], entry["prompt_tokens"], entry["new_tokens"])
                self._keep(entry["doc_id"], entry["prompt"], answer)

    def _keep(self, doc_id: int, prompt: str, answer: Answer) -> None:
        self._answers[doc_id, prompt] = answer
        self._documents.add(doc_id)
