"""Scores, differences, accuracy against FLOPs, and answers that changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pmod_cli.evaluation.paper import JUDGED, TABLES, average
from pmod_cli.output.tables import Table
from pmod_cli.output.units import signed
from pmod_cli.published import COSTS, SCORES
from pmod_cli.report import figures
from pmod_cli.report.document import Block, Notes, Section, Text
from pmod_cli.report.examples import changes
from pmod_cli.report.models import Model, compare

_HALF_INTERVAL = 1.96
"""Half a 95 % interval, in standard errors."""

_EXAMPLES = 8
_PAPER_TASKS = {task: title for columns in TABLES for title, task in columns.items()} | {JUDGED: "MMB"}


def accuracy(models: Sequence[Model], other: Model | None) -> Section:
    """Scores with intervals, and differences to the dense model.

    Args:
        models: All models, one column each.
        other: The dense model, if there is one.
    """
    tasks = list(dict.fromkeys(task for model in models for task in model.scores))
    if not tasks:
        return Section("Accuracy")
    blocks: list[Block] = [_scores(models, tasks)]
    notes = ["± is half the 95 % interval (1.96 bootstrap standard errors over the samples)."]
    gaps = _gaps([model for model in models if model is not other], other, tasks) if other else None
    if gaps:
        blocks.append(gaps)
        notes.append("95 % interval of a paired bootstrap over the samples; * where it excludes 0.")
    return Section("Accuracy", [*blocks, Notes(notes)])


def _scores(models: Sequence[Model], tasks: Sequence[str]) -> Table:
    rows: list[list[str]] = []
    for task in tasks:
        rows.append([task, *(_score(model.scores.get(task)) for model in models)])
        rows += _kinds(models, task)
    if len(tasks) > 1 and all(task in model.scores for task in tasks for model in models):
        means = [mean_accuracy(model, tasks) for model in models]
        rows.append(["mean", *("-" if math.isnan(mean) else f"{mean:.1f}" for mean in means)])
    return Table("Scores in points", ["", *(model.label for model in models)], rows)


def _gaps(models: Sequence[Model], other: Model, tasks: Sequence[str]) -> Table | None:
    """Differences to the dense model; None if nothing can be compared."""
    rows = [[task, *(_gap(model, other, task) for model in models)] for task in tasks]
    rows = [row for row in rows if any(cell != "-" for cell in row[1:])]
    header = ["", *(model.label for model in models)]
    return Table(f"Difference to {other.label}, in points", header, rows) if rows else None


def _gap(model: Model, other: Model, task: str) -> str:
    gap = compare(model, other, task) if task in model.scores and task in other.scores else None
    if gap is None:
        return "-"
    star = " *" if gap.significant else ""
    return f"{signed(gap.points)} ({signed(gap.low)} to {signed(gap.high)}){star}"


def accuracy_and_flops(models: Sequence[Model]) -> Section:
    """One point per model, the published ones beside them."""
    title = "Accuracy against FLOPs"
    costed = [model for model in models if model.flops and model.scores]
    shared = [
        task
        for task in (costed[0].scores if costed else ())
        if all(task in model.scores and model.scores[task]["value"] is not None for model in costed)
    ]
    if not shared:
        missing = (
            "No model has both a score and a profile: run pmod profile with --json into the same folder."
        )
        return Section(title, [Text(missing)] if models else [])
    ours = [
        figures.Point(
            model.label,
            model.flops or 0,
            mean_accuracy(model, shared),
            _half_width(model, shared),
            model.is_pmod,
        )
        for model in costed
    ]
    together = all(task in _PAPER_TASKS for task in shared)
    theirs = _published(costed[0].family, shared if together else None)
    what = f"{shared[0]}, points" if len(shared) == 1 else f"mean of {len(shared)} tasks, points"
    caption = f"Accuracy ({', '.join(shared)}) over the prefill FLOPs of one sample; bars are 95 % intervals."
    if theirs and together:
        caption += " Hollow: the paper's 7B models on the same tasks, FLOPs as the paper counts them."
    elif theirs:
        caption += " Beside it the paper's 7B models, on their 14 tasks."
    return Section(
        title, [figures.accuracy_figure(ours, theirs, together=together, what=what, caption=caption)]
    )


def differences(models: Sequence[Model], other: Model | None) -> Section:
    """Samples that a p-MoD model and the dense one scored differently, with pictures."""
    blocks: list[Block] = []
    for model in models if other else ():
        if other is None or not model.is_pmod:
            continue
        found, examples = changes(model, other, _EXAMPLES)
        if found.compared:
            words = (
                f"{model.label} against {other.label}: of {found.compared} samples {len(found.better)} became right "
                f"or better, {len(found.worse)} wrong or worse."
            )
            blocks += [Text(words), *examples]
    return Section("Samples that differ", blocks)


def mean_accuracy(model: Model, tasks: Sequence[str]) -> float:
    """Mean over tasks, MME taken out of 100 instead of 2000; NaN if a score is missing."""
    values = [model.scores[task]["value"] for task in tasks]
    if any(value is None for value in values):
        return math.nan
    return sum(_of_100(task, value) for task, value in zip(tasks, values, strict=True)) / len(tasks)


def _of_100(task: str, points: float) -> float:
    return points / 20 if task == "mme" else points


def _half_width(model: Model, tasks: Sequence[str]) -> float | None:
    """Half the 95 % interval of the mean, tasks being independent; None if an error is not known."""
    errors = {task: model.scores[task].get("stderr") for task in tasks}
    if None in errors.values():
        return None
    squares = sum(_of_100(task, float(error or 0)) ** 2 for task, error in errors.items())
    return _HALF_INTERVAL * squares**0.5 / len(tasks)


def _published(family: str, tasks: Sequence[str] | None) -> list[figures.Point]:
    """The paper's dense and p-MoD model of a family, on some of its tasks or on all."""
    if family not in COSTS or family not in SCORES:
        return []
    costs = COSTS[family]
    points = []
    for role, tera, name in (
        ("baseline", costs.dense_tflops, costs.model),
        ("model", costs.pmod_tflops, f"p-MoD-{costs.model}"),
    ):
        values: dict[str, float | None] = dict(SCORES[family][role])
        if tasks is not None:
            values = {_PAPER_TASKS[task]: values[_PAPER_TASKS[task]] for task in tasks}
        mean = average(values)
        assert mean is not None
        points.append(figures.Point(f"{name} (paper)", tera * 1e12, mean, None, role == "model"))
    return points


def _score(score: dict[str, Any] | None) -> str:
    if score is None:
        return "-"
    if score["value"] is None:
        return f"{score['failed']} failed" if score.get("failed") else "none"
    error = score.get("stderr")
    return f"{score['value']:.1f}" + (f" ± {_HALF_INTERVAL * error:.1f}" if error is not None else "")


def _kinds(models: Sequence[Model], task: str) -> list[list[str]]:
    """Rows of a task's kinds of question, where it tells them apart (exact match by kind)."""
    found: dict[str, dict[int, float]] = {}
    for column, model in enumerate(models):
        score = model.scores.get(task)
        if score is None or len(score["tasks"]) != 1:
            continue
        metrics = score["metrics"][score["tasks"][0]]
        if "exact_match,none" not in metrics:
            continue
        for key, value in metrics.items():
            if key != "exact_match,none":
                found.setdefault(key.removesuffix(",none"), {})[column] = value * score["scale"]
    return [
        [
            f"– {kind}",
            *(f"{values[column]:.1f}" if column in values else "-" for column in range(len(models))),
        ]
        for kind, values in sorted(found.items())
    ]
