"""The paper's 14 tasks in its two tables, our scores beside the published ones."""

from __future__ import annotations

from collections.abc import Mapping

from pmod_cli.evaluation.results import EvalResult, PaperRow
from pmod_cli.published import COLUMNS, SCORES

JUDGED = "mmbench_en_dev"
STATIC = "mmbench_en_dev_static"

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


def expand(names: list[str]) -> list[str]:
    """Replace ``paper`` by its 14 tasks, with the judged MMBench in place of the static one if it is named too."""
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
    by_title = {}
    scores = {task.name: task for task in result.tasks}
    for title, task in (pair for columns in TABLES for pair in columns.items()):
        score = scores.get(task) or (scores.get(JUDGED) if task == STATIC else None)
        if score is None:
            return []
        by_title[title] = score
    model_type = str(result.model.get("model_type", ""))
    sparse = model_type.startswith("pmod_")
    published = SCORES.get(model_type.removeprefix("pmod_"))
    built = []
    for columns in COLUMNS:
        model = {title: by_title[title].model.value for title in columns}
        sides = {title: by_title[title].baseline for title in columns}
        baseline = {title: side.value if side else None for title, side in sides.items()}
        rows = _ours(model, baseline if result.baseline else None, "p-MoD" if sparse else "model")
        if published:
            rows += _theirs(published, model, baseline if result.baseline else None, sparse)
        built.append(rows)
    return built


def _ours(model: Values, baseline: Values | None, name: str) -> list[PaperRow]:
    if baseline is None:
        return [_row(f"our {name}", model)]
    return [
        _row("our baseline", baseline),
        _row(f"our {name}", model),
        _difference("difference", model, baseline),
    ]


def _theirs(
    published: Mapping[str, Values], model: Values, baseline: Values | None, sparse: bool
) -> list[PaperRow]:
    """The published rows, and what ours have more than the published model of the same kind."""
    dense, pmod = ({title: published[role][title] for title in model} for role in ("baseline", "model"))
    rows = [
        _row("paper: baseline", dense),
        _row("paper: p-MoD", pmod),
        _difference("paper: difference", pmod, dense),
    ]
    if baseline:
        rows.append(_difference("ours - paper: baseline", baseline, dense))
    rows.append(
        _difference(f"ours - paper: {'p-MoD' if sparse else 'model'}", model, pmod if sparse else dense)
    )
    return rows


def _row(label: str, values: Values) -> PaperRow:
    return PaperRow(label, dict(values), average(values))


def _difference(label: str, left: Values, right: Values) -> PaperRow:
    values: dict[str, float | None] = {}
    for title in left:
        a, b = left[title], right[title]
        values[title] = None if a is None or b is None else a - b
    return _row(label, values)


def average(values: Values) -> float | None:
    """Mean over columns, MME taken out of 100 instead of 2000; None if any is missing."""
    known = [value / 20 if title == "MME" else value for title, value in values.items() if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
