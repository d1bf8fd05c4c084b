"""The paper's 14 tasks in its two tables, our scores beside the published ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pmod_cli.output.errors import PmodError
from pmod_cli.published import COLUMNS, SCORES

if TYPE_CHECKING:
    from pmod_cli.evaluation.results import EvalResult

JUDGED = "mmbench_en_dev"
"""MMBench with a paid judge."""

STATIC = "mmbench_en_dev_static"
"""MMBench without one."""

TASKS = (
    *("seedbench", "realworldqa", "mme", STATIC, "pope_full", "gqa", "ai2d"),
    *("docvqa_val", "chartqa", "textvqa_val", "infovqa_val", "ok_vqa", "mmmu_val", "scienceqa_img"),
)
TABLES = (
    dict(zip(COLUMNS[0], TASKS[:7], strict=True)),
    dict(zip(COLUMNS[1], TASKS[7:], strict=True)),
)
"""Title of a column and its task, in the paper's order."""

Values = Mapping[str, float | None]
"""Scores by column."""


class PaperRow(NamedTuple):
    """One line of the paper's tables: whose scores, by column (None where there is none), and their `average`."""

    label: str
    values: dict[str, float | None]
    average: float | None


def expand(names: Sequence[str]) -> list[str]:
    """Replace ``paper`` by its 14 tasks, with the judged MMBench in place of the static one if it is named too."""
    if not names:
        raise PmodError("no task to evaluate", "e.g. --tasks gqa,pope_full")
    paper = [JUDGED if task == STATIC and JUDGED in names else task for task in TASKS]
    expanded = [task for name in names for task in (paper if name == "paper" else [name])]
    return list(dict.fromkeys(expanded))


def notes(result: EvalResult) -> list[str]:
    """What a reader of the two tables has to know."""
    if any(task.name == JUDGED for task in result.tasks):
        mmbench = "MMB: a paid judge read the answers without an option letter, as for the published figures."
    else:
        mmbench = (
            "MMB: option letters parsed by rule (mmbench_en_dev_static). The published figures had a paid judge for "
            "the answers without a letter: --tasks paper,mmbench_en_dev."
        )
    return [
        "Average: over the row's columns, with MME's perception score divided by 20 to be out of 100 as the others "
        "are; the same for the published figures.",
        "Published: 7B models (arXiv 2412.04449, tables 1 and 2).",
        "POPE: F1, mean of its three parts. MME: perception score, at most 2000.",
        mmbench,
    ]


def tables(result: EvalResult) -> list[list[PaperRow]]:
    """The two tables, or none unless every task of the paper was evaluated.

    Each has our baseline, our model and their difference as far as they were evaluated, then the published figures
    of the model's family and how far ours are from them.
    """
    scores = {STATIC if task.name == JUDGED else task.name: task for task in result.tasks}
    if not scores.keys() >= set(TASKS):
        return []
    model_type = str(result.model.get("model_type", ""))
    sparse = model_type.startswith("pmod_")
    published = SCORES.get(model_type.removeprefix("pmod_"))
    kind = "p-MoD" if sparse else "model"
    built = []
    for columns in TABLES:
        ours = {title: scores[task].model.value for title, task in columns.items()}
        rows = [_row(f"our {kind}", ours)]
        base: Values = {}
        if result.baseline:
            sides = {title: scores[task].baseline for title, task in columns.items()}
            base = {title: side.value if side else None for title, side in sides.items()}
            rows = [_row("our baseline", base), *rows, _difference("difference", ours, base)]
        if published:
            dense, pmod = (
                {title: published[role][title] for title in ours} for role in ("baseline", "model")
            )
            rows += [
                _row("paper: baseline", dense),
                _row("paper: p-MoD", pmod),
                _difference("paper: difference", pmod, dense),
            ]
            if base:
                rows.append(_difference("ours - paper: baseline", base, dense))
            rows.append(_difference(f"ours - paper: {kind}", ours, pmod if sparse else dense))
        built.append(rows)
    return built


def _row(label: str, values: Values) -> PaperRow:
    return PaperRow(label, dict(values), average(values))


def _difference(label: str, left: Values, right: Values) -> PaperRow:
    pairs = {title: (left[title], right[title]) for title in left}
    return _row(label, {title: None if a is None or b is None else a - b for title, (a, b) in pairs.items()})


def average(values: Values) -> float | None:
    """Mean over columns, MME taken out of 100 instead of 2000; None if any is missing."""
    known = [value / 20 if title == "MME" else value for title, value in values.items() if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
