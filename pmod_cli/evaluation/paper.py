"""The paper's 14 tasks: its two tables (p-MoD, arXiv 2412.04449v2, tables 1 and 2), beside our own figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pmod_cli.evaluation.results import EvalResult

JUDGED = "mmbench_en_dev"
STATIC = "mmbench_en_dev_static"

TABLES: tuple[dict[str, str], ...] = (
    {
        "SEED": "seedbench",
        "RWQA": "realworldqa",
        "MME": "mme",
        "MMB": STATIC,
        "POPE": "pope_full",
        "GQA": "gqa",
        "AI2D": "ai2d",
    },
    {
        "DocVQA": "docvqa_val",
        "ChartQA": "chartqa",
        "TextVQA": "textvqa_val",
        "InfoVQA": "infovqa_val",
        "OK-VQA": "ok_vqa",
        "MMMU": "mmmu_val",
        "SQA": "scienceqa_img",
    },
)
"""Title of a column and its task, in the paper's order."""

TASKS = tuple(task for columns in TABLES for task in columns.values())

_COLUMNS = tuple(title for columns in TABLES for title in columns)


def _figures(*values: float) -> dict[str, float]:
    return dict(zip(_COLUMNS, values, strict=True))


PUBLISHED: dict[str, dict[str, dict[str, float]]] = {
    "llava": {
        "baseline": _figures(
            66.2, 55.6, 1506.8, 64.1, 85.9, 61.9, 55.2, 28.1, 18.2, 46.0, 25.8, 53.4, 36.6, 69.7
        ),
        "model": _figures(
            66.5, 55.7, 1482.8, 65.4, 85.5, 62.2, 56.2, 27.6, 16.8, 44.8, 26.8, 56.0, 36.3, 69.3
        ),
    },
    "llava_next": {
        "baseline": _figures(
            68.9, 57.6, 1519.3, 67.5, 87.2, 63.5, 64.0, 70.1, 61.6, 62.7, 34.7, 54.0, 35.3, 69.7
        ),
        "model": _figures(
            69.0, 57.6, 1495.5, 67.3, 86.8, 63.3, 65.1, 70.0, 61.8, 60.5, 34.1, 55.1, 36.0, 71.0
        ),
    },
}
"""7B figures by family (``model_type`` of the dense model), baseline and p-MoD."""


@dataclass(frozen=True)
class PaperRow:
    """One line of a table.

    Attributes:
        label: Whose figures.
        values: By column; None where there is none.
        average: Over all columns, or None if one is missing.
    """

    label: str
    values: dict[str, float | None]
    average: float | None

    def to_dict(self) -> dict[str, Any]:
        """As it stands in ``results.json``."""
        return vars(self)


def expand(names: list[str]) -> list[str]:
    """Replace ``paper`` by its 14 tasks, with the judged MMBench in place of the static one if it is named too."""
    paper = [JUDGED if task == STATIC and JUDGED in names else task for task in TASKS]
    expanded = [task for name in names for task in (paper if name == "paper" else [name])]
    return list(dict.fromkeys(expanded))


def notes(result: EvalResult) -> list[str]:
    """What a reader of the two tables has to know."""
    judged = any(task.name == JUDGED for task in result.tasks)
    told = [
        "Average: over the row's columns, MME's perception score divided by 20 to be out of 100 as the others are; "
        "of the published figures likewise.",
        "Published: 7B models (arXiv 2412.04449, tables 1 and 2).",
        "POPE: F1, mean of its three parts. MME: perception score, at most 2000.",
    ]
    if judged:
        told.append(
            "MMB: a paid judge read the answers without an option letter, as for the published figures."
        )
    else:
        told.append(
            "MMB: option letters parsed by rule (mmbench_en_dev_static). The published figures had a paid judge for "
            "the answers without a letter: --tasks paper,mmbench_en_dev."
        )
    return told


def tables(result: EvalResult) -> list[list[PaperRow]]:
    """The two tables, or none unless every task of the paper was evaluated.

    Each has our baseline, our model and their difference as far as they were evaluated, then the published figures
    of the model's family and how far ours are from them.
    """
    by_name = {task.name: task for task in result.tasks}
    if not all(task in by_name or (task == STATIC and JUDGED in by_name) for task in TASKS):
        return []
    model_type = str(result.model.get("model_type", ""))
    published = PUBLISHED.get(model_type.removeprefix("pmod_"))
    sparse = model_type.startswith("pmod_")
    role = "p-MoD" if sparse else "model"
    built = []
    for columns in TABLES:
        rows = []
        ours = {
            title: by_name.get(task) or by_name[JUDGED if task == STATIC else task]
            for title, task in columns.items()
        }
        model = {title: task.model.value for title, task in ours.items()}
        baseline = {title: task.baseline.value if task.baseline else None for title, task in ours.items()}
        if result.baseline:
            rows.append(_row("our baseline", baseline))
        rows.append(_row(f"our {role}", model))
        if result.baseline:
            rows.append(_difference("difference", model, baseline))
        if published:
            theirs = {side: {title: published[side][title] for title in columns} for side in published}
            rows.append(_row("paper: baseline", theirs["baseline"]))
            rows.append(_row("paper: p-MoD", theirs["model"]))
            rows.append(_difference("paper: difference", theirs["model"], theirs["baseline"]))
            if result.baseline:
                rows.append(_difference("ours - paper: baseline", baseline, theirs["baseline"]))
            counterpart = theirs["model" if sparse else "baseline"]
            rows.append(_difference(f"ours - paper: {'p-MoD' if sparse else 'model'}", model, counterpart))
        built.append(rows)
    return built


def _row(label: str, values: Mapping[str, float | None]) -> PaperRow:
    return PaperRow(label, dict(values), average(values))


def _difference(label: str, left: Mapping[str, float | None], right: Mapping[str, float | None]) -> PaperRow:
    values: dict[str, float | None] = {}
    for title in left:
        a, b = left[title], right[title]
        values[title] = None if a is None or b is None else a - b
    return _row(label, values)


def average(values: Mapping[str, float | None]) -> float | None:
    """Mean over columns, MME taken out of 100 instead of 2000; None if any is missing."""
    shares = [
        value / 20 if title == "MME" and value is not None else value for title, value in values.items()
    ]
    known = [value for value in shares if value is not None]
    return sum(known) / len(shares) if len(known) == len(shares) else None
