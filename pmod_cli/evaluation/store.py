"""Answers on disk, batch by batch, so that a killed evaluation goes on where it stopped."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from pmod_cli.generation import Answer
from pmod_cli.output.files import read_json_lines


class AnswerStore:
    """The answers of one model to one task, as JSON lines; every process writes its own file and reads all.

    Whoever makes the folder's name has to put into it all that an answer depends on but the prompt (checkpoint,
    task version, generation settings, data).

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
        self._path = folder / f"rank{rank}.jsonl"
        if fresh:
            for path in folder.glob("rank*.jsonl"):
                if int(path.stem.removeprefix("rank")) % processes == rank:
                    path.unlink()
            return
        for path in sorted(folder.glob("rank*.jsonl")):
            self._read(path)

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, doc_id: int, prompt: str) -> Answer | None:
        """The stored answer to a document's prompt, or None."""
        return self._answers.get((doc_id, _digest(prompt)))

    def add(self, answers: Iterable[tuple[int, str, Answer]]) -> None:
        """Store a batch's answers; when this returns they are on the disk."""
        lines = []
        for doc_id, prompt, answer in answers:
            key = (doc_id, _digest(prompt))
            self._answers[key] = answer
            line = {"doc_id": doc_id, "prompt": key[1], "answer": answer.text}
            lines.append(line | {"prompt_tokens": answer.prompt_tokens, "new_tokens": answer.new_tokens})
        if not lines:
            return
        with self._path.open("a+b") as file:
            if file.tell() and self._ends_torn(file.fileno(), file.tell()):
                file.write(b"\n")
            file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
            file.flush()
            os.fsync(file.fileno())

    def _read(self, path: Path) -> None:
        for entry in read_json_lines(path):
            with contextlib.suppress(KeyError, TypeError):  # a line that is not ours
                answer = Answer(entry["answer"], entry["prompt_tokens"], entry["new_tokens"])
                self._answers[entry["doc_id"], entry["prompt"]] = answer

    @staticmethod
    def _ends_torn(descriptor: int, size: int) -> bool:
        return os.pread(descriptor, 1, size - 1) != b"\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
