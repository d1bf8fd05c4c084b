"""Two evaluations of the same tasks, sample by sample: which answers became right, which wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmod_cli.checkpoints.source import read_json
from pmod_cli.evaluation.catalogue import Tasks
from pmod_cli.output.errors import PmodError


@dataclass(frozen=True)
class Change:
    """A sample whose score differs.

    Attributes:
        task: Name of the task.
        doc_id: Which document.
        prompt: The question.
        target: The right answer.
        before: Answer and score in the first evaluation.
        after: Answer and score in the second.
        pictures: Where the document's pictures were written to.
    """

    task: str
    doc_id: int
    prompt: str
    target: Any
    before: dict[str, Any]
    after: dict[str, Any]
    pictures: list[str]


def differences(first: str | Path, second: str | Path, *, pictures: bool = True) -> dict[str, Any]:
    """Compare the models of two output folders.

    Args:
        first: Output folder of one evaluation.
        second: Output folder of the other; pictures of changed samples are written below it.
        pictures: Whether to write them; that needs the tasks' data.

    Returns:
        ``compared``, ``better``, ``worse``, ``left_out`` (samples of shared tasks that failed, do not count for the
        score, were asked otherwise, or are in one folder alone): numbers of samples; ``changed``: the changes, worse
        ones first; ``tasks``: what was compared.

    Raises:
        PmodError: A folder is not one of an evaluation, or they have no task in common.
    """
    before, after = _samples(Path(first)), _samples(Path(second))
    shared = sorted(before.keys() & after.keys())
    if not shared:
        raise PmodError(f"{first} and {second} have no task in common")
    compared, left_out, changed = 0, 0, []
    for task in shared:
        left_out += len(before[task].keys() ^ after[task].keys())
        for doc_id in before[task].keys() & after[task].keys():
            old, new = before[task][doc_id], after[task][doc_id]
            scores = old["model"]["score"], new["model"]["score"]
            if old["prompt"] != new["prompt"] or None in scores:
                left_out += 1
                continue
            compared += 1
            if scores[0] != scores[1]:
                changed.append((task, doc_id, old, new))
    changed.sort(key=lambda entry: (_gain(entry[2], entry[3]) > 0, entry[0], entry[1]))
    paths = _write_pictures([entry[:2] for entry in changed], Path(second)) if pictures and changed else {}
    worse = sum(_gain(old, new) < 0 for _, _, old, new in changed)
    return {
        "tasks": shared,
        "compared": compared,
        "left_out": left_out,
        "better": len(changed) - worse,
        "worse": worse,
        "changed": [
            vars(
                Change(
                    task,
                    doc_id,
                    new["prompt"],
                    new["target"],
                    {key: old["model"][key] for key in ("answer", "score")},
                    {key: new["model"][key] for key in ("answer", "score")},
                    paths.get((task, doc_id), []),
                )
            )
            for task, doc_id, old, new in changed
        ],
    }


def _gain(old: dict[str, Any], new: dict[str, Any]) -> float:
    return new["model"]["score"] - old["model"]["score"]


def _samples(folder: Path) -> dict[str, dict[int, dict[str, Any]]]:
    # Only what the last results are of: samples of other tasks may be those of another model (--force).
    results = folder / "results.json"
    finished = read_json(results).get("tasks") if results.is_file() else None
    if not finished:
        raise PmodError(f"{folder} holds no evaluation", "give the --output folder of a finished `pmod eval`")
    found = {}
    for name in sorted(leaf for task in finished for leaf in task["tasks"]):
        file = folder / "samples" / f"{name}.jsonl"
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        found[file.stem] = {row["doc_id"]: row for row in rows if "model" in row}
    return found


def pictures_of(wanted: Sequence[tuple[str, int]], folder: Path) -> dict[tuple[str, int], list[Any]]:
    """Take the pictures of documents from the tasks' data.

    Args:
        wanted: Task and document each.
        folder: Of the evaluation.

    Returns:
        PIL images by task and document; of tasks whose data are gone there are none.
    """
    settings = json.loads((folder / "results.json").read_text(encoding="utf-8"))["settings"]
    names = sorted({task for task, _ in wanted})
    catalogue = Tasks(names, settings.get("include_path") or [])
    found: dict[tuple[str, int], list[Any]] = {}
    for name in names:
        try:
            task = catalogue.load(name)
        except PmodError:
            continue
        for doc_id in (doc_id for task_name, doc_id in wanted if task_name == name):
            found[name, doc_id] = list(task.doc_to_visual(task.eval_docs[doc_id]) or [])
    return found


def _write_pictures(wanted: Sequence[tuple[str, int]], folder: Path) -> dict[tuple[str, int], list[str]]:
    written: dict[tuple[str, int], list[str]] = {}
    for (name, doc_id), pictures in pictures_of(wanted, folder).items():
        target = folder / "pictures" / name
        target.mkdir(parents=True, exist_ok=True)
        for index, picture in enumerate(pictures):
            path = target / f"{doc_id}-{index}.png"
            picture.save(path)
            written.setdefault((name, doc_id), []).append(str(path))
    return written
