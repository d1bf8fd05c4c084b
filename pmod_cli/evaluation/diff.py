"""Two evaluations of the same tasks, document by document: which answers became right, which wrong."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from pmod_cli.evaluation.catalogue import Tasks
from pmod_cli.evaluation.folder import PICTURES
from pmod_cli.evaluation.requirements import check, offline_mode
from pmod_cli.output.errors import PmodError, told_as
from pmod_cli.output.files import check_links, open_folder, write_file
from pmod_cli.output.paths import is_inside
from pmod_cli.output.reading import is_number, read_json, read_json_lines
from pmod_cli.pictures import as_rgb

Answers = dict[int, dict[str, Any]]
"""One model's answers to a task. By document: ``prompt``, ``target``, ``answer``, ``score`` and more."""


class Change(NamedTuple):
    """A document whose score differs, with its entries of `Answers` in the first evaluation and in the second."""

    task: str
    doc_id: int
    before: dict[str, Any]
    after: dict[str, Any]

    @property
    def gain(self) -> float:
        """Score after less score before."""
        return self.after["score"] - self.before["score"]


@dataclass
class Comparison:
    """What differs between two models: documents with a lower score and with a higher one, by task and document.

    Those of shared tasks are left out that failed, do not count for the score, were asked with another prompt, or are
    on one side alone.
    """

    compared: int = 0
    left_out: int = 0
    worse: list[Change] = field(default_factory=list)
    better: list[Change] = field(default_factory=list)


def check_task_name(task: Any) -> str:
    """Refuse a task's name that leads out of the folder of its evaluation, which may be a stranger's."""
    if not isinstance(task, str) or not re.fullmatch(r"[^./\\\0][^/\\\0]{,200}", task):
        raise PmodError(f"{task!r} is no name of a task", "these results were not written by pmod eval")
    return task


def read_answers(folder: Path, task: str, role: str = "model") -> Answers:
    """One model's answers to a task, from an evaluation's folder; empty if they were not kept."""
    path = folder / "samples" / f"{check_task_name(task)}.jsonl"
    rows = read_json_lines(path) if is_inside(path, folder) else []
    if not all(_is_sample(row, role) for row in rows):
        raise PmodError(f"{path} holds a line that pmod eval does not write")
    return {
        row["doc_id"]: {"prompt": row["prompt"], "target": row["target"]} | row[role]
        for row in rows
        if role in row
    }


def _is_sample(row: Any, role: str) -> bool:
    """Whether a line has what is compared of a model's answer."""
    if not isinstance(row, dict) or not {"doc_id", "prompt", "target"} <= row.keys():
        return False
    side = row.get(role, {"answer": "", "score": None})
    if type(row["doc_id"]) is not int or not isinstance(side, dict) or not {"answer", "score"} <= side.keys():
        return False
    return side["score"] is None or is_number(side["score"])


def compare_answers(before: Mapping[str, Answers], after: Mapping[str, Answers]) -> Comparison:
    """Compare two models on the tasks that both have, document by document."""
    found = Comparison()
    for task in sorted(before.keys() & after.keys()):
        found.left_out += len(before[task].keys() ^ after[task].keys())
        for doc_id in sorted(before[task].keys() & after[task].keys()):
            change = Change(task, doc_id, before[task][doc_id], after[task][doc_id])
            scores = change.before["score"], change.after["score"]
            if change.before["prompt"] != change.after["prompt"] or None in scores:
                found.left_out += 1
                continue
            found.compared += 1
            if change.gain:
                (found.better if change.gain > 0 else found.worse).append(change)
    return found


def differences(
    first: Path, second: Path, include_path: Sequence[str | Path] | None = None
) -> dict[str, Any]:
    """Compare the models of two output folders; pictures of changed documents are written below the second.

    The pictures come from the tasks' data. Tasks of the user's own are found in ``include_path``; which folder the
    results name is not followed: it would run a stranger's code.

    Returns:
        ``tasks``: what was compared; ``compared``, ``left_out``, ``better``, ``worse``: numbers of documents (see
        `Comparison`); ``changed``: the changes, worse ones first.

    Raises:
        PmodError: A folder is not one of an evaluation, or they have no task in common.
    """
    before, after = _all_answers(first), _all_answers(second)
    shared = sorted(before.keys() & after.keys())
    if not shared:
        raise PmodError(f"{first} and {second} have no task in common")
    found = compare_answers(before, after)
    changed = [*found.worse, *found.better]
    pictures = pictures_of([(change.task, change.doc_id) for change in changed], include_path)
    check_links(second, [PICTURES])
    entries = []
    for task, doc_id, old, new in changed:
        paths = []
        for index, picture in enumerate(pictures.get((task, doc_id), [])):
            path = second / PICTURES / task / f"{doc_id}-{index}.png"
            path.parent.parent.mkdir(exist_ok=True)
            open_folder(path.parent, ["*.png"])
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            write_file(path, buffer.getvalue())
            paths.append(str(path))
        entries.append(
            {
                "task": task,
                "doc_id": doc_id,
                "prompt": new["prompt"],
                "target": new["target"],
                "before": {key: old[key] for key in ("answer", "score")},
                "after": {key: new[key] for key in ("answer", "score")},
                "pictures": paths,
            }
        )
    return {
        "tasks": shared,
        "compared": found.compared,
        "left_out": found.left_out,
        "better": len(found.better),
        "worse": len(found.worse),
        "changed": entries,
    }


def _all_answers(folder: Path) -> dict[str, Answers]:
    # Only those of the last results: samples of other tasks may be those of another model (--force).
    results = folder / "results.json"
    finished = read_json(results).get("tasks") if results.is_file() else None
    if not finished:
        raise PmodError(f"{folder} holds no evaluation", "give the --output folder of a finished `pmod eval`")
    with told_as(f"{results} is not what pmod eval writes"):
        leaves = dict.fromkeys(leaf for task in finished for leaf in task["tasks"])
        return {leaf: read_answers(folder, leaf) for leaf in leaves}


def pictures_of(
    wanted: Sequence[tuple[str, int]], include_path: str | Path | Sequence[str | Path] | None
) -> dict[tuple[str, int], list[Image.Image]]:
    """Pictures of documents in RGB, by task and number, from the tasks' data; none where these are gone or changed.

    Results name the tasks, and may be a stranger's: no network is asked for data that are not on this machine.
    """
    if not wanted:
        return {}
    names = sorted({task for task, _ in wanted})
    catalogue = Tasks(names, include_path)
    found = {}
    with offline_mode(True):
        loaded = {}
        for name in names:
            with contextlib.suppress(PmodError):
                check(catalogue, [name], offline=True, preparing=True)
                loaded[name] = catalogue.load(name)
        for name, doc_id in wanted:
            if name in loaded and 0 <= doc_id < len(loaded[name].eval_docs):
                with contextlib.suppress(Exception):  # data of other days: the answers are shown without
                    visuals = loaded[name].doc_to_visual(loaded[name].eval_docs[doc_id]) or []
                    found[name, doc_id] = [as_rgb(each) for each in visuals if isinstance(each, Image.Image)]
    return found
