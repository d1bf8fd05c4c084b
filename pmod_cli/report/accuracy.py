"""Scores, differences, accuracy against FLOPs, and answers that changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pmod_cli.evaluation.paper import JUDGED, PUBLISHED, TABLES, average
from pmod_cli.profiling.published import published_family
from pmod_cli.report import figures
from pmod_cli.report.document import Block, Notes, Section, Table, Text
from pmod_cli.report.examples import changes
from pmod_cli.report.models import Model, compare
from pmod_cli.report.text import signed

_NORMAL = 1.96
_EXAMPLES = 8
_PAPER_TASKS = {task: title for columns in TABLES for title, task in columns.items()} | {JUDGED: "MMB"}


def accuracy(models: Sequence[Model], other: Model | None) -> Section:
    """Scores with intervals, and differences to the dense model."""
    tasks = list(dict.fromkeys(task for model in models for task in model.scores))
    if not tasks:
        return Section("Accuracy")
    rows = []
    for task in tasks:
        rows.append([task, *(_score(model.scores.get(task)) for model in models)])
        rows += _kinds(models, task)
    if len(tasks) > 1 and all(task in model.scores for task in tasks for model in models):
        rows.append(["mean", *(_number(mean_accuracy(model, tasks)) for model in models)])
    table = Table("Scores in points", ["", *(model.label for model in models)], rows)
    notes = ["± is half the 95 % interval (1.96 bootstrap standard errors over the samples)."]
    blocks: list[Block] = [table]
    compared = [model for model in models if model is not other] if other else []
    gaps = []
    for task in tasks:
        cells = []
        for model in compared:
            assert other is not None
            both = task in model.scores and task in other.scores
            gap = compare(model, other, task) if both else None
            star = " *" if gap and gap.significant else ""
            cells.append(
                f"{signed(gap.points)} ({signed(gap.low)} to {signed(gap.high)}){star}" if gap else "-"
            )
        if any(cell != "-" for cell in cells):
            gaps.append([task, *cells])
    if gaps and other:
        blocks.append(
            Table(f"Difference to {other.label}, in points", ["", *(m.label for m in compared)], gaps)
        )
        notes.append("95 % interval of a paired bootstrap over the samples; * where it leaves out 0.")
    return Section("Accuracy", [*blocks, Notes(notes)])


def accuracy_and_flops(models: Sequence[Model]) -> Section:
    """One point a model, the published ones beside them."""
    costed = [model for model in models if model.flops and model.scores]
    shared = [task for task in (costed[0].scores if costed else ()) if all(task in m.scores for m in costed)]
    shared = [task for task in shared if all(m.scores[task]["value"] is not None for m in costed)]
    if not shared:
        missing = (
            "No model has both a score and a profile: run pmod profile with --json into the same folder."
        )
        return Section("Accuracy against FLOPs", [Text(missing)] if models else [])
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
    family = costed[0].family
    theirs = _published(family, shared if together else None)
    what = f"{shared[0]}, points" if len(shared) == 1 else f"mean of {len(shared)} tasks, points"
    caption = f"Accuracy ({', '.join(shared)}) over the prefill FLOPs of one sample; bars are 95 % intervals."
    if theirs and together:
        caption += " Hollow: the paper's 7B models on the same tasks, FLOPs as the paper counts them."
    elif theirs:
        caption += " Beside it the paper's 7B models, on their 14 tasks."
    return Section(
        "Accuracy against FLOPs",
        [figures.accuracy_figure(ours, theirs, together=together, what=what, caption=caption)],
    )


def differences(models: Sequence[Model], other: Model | None) -> Section:
    """Samples that a p-MoD model and the dense one scored differently, with pictures."""
    blocks: list[Block] = []
    for model in models:
        if other is None or not model.is_pmod:
            continue
        tasks = [task for task in model.samples if task in other.samples]
        found = changes(model, other, tasks, _EXAMPLES)
        if found.compared:
            blocks.append(
                Text(
                    f"{model.label} against {other.label}: of {found.compared} samples {found.better} became right or "
                    f"better, {found.worse} wrong or worse."
                )
            )
            blocks += found.shown
    return Section("Samples that differ", blocks)


def mean_accuracy(model: Model, tasks: Sequence[str]) -> float:
    """Mean over tasks, MME taken out of 100 instead of 2000; NaN if a score is missing."""
    values = [model.scores[task]["value"] for task in tasks]
    if any(value is None for value in values):
        return float("nan")
    shares = [value / 20 if task == "mme" else value for task, value in zip(tasks, values, strict=True)]
    return sum(shares) / len(shares)


def _published(family: str, tasks: Sequence[str] | None) -> list[figures.Point]:
    """The paper's dense and p-MoD model of a family, on some of its tasks or on all."""
    flops = published_family(family)
    if flops is None or family not in PUBLISHED:
        return []
    points = []
    for role, tera, name in (
        ("baseline", flops.dense_tflops, flops.model),
        ("model", flops.pmod_tflops, f"p-MoD-{flops.model}"),
    ):
        values: dict[str, float | None] = dict(PUBLISHED[family][role])
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
    return f"{score['value']:.1f}" + (f" ± {_NORMAL * error:.1f}" if error is not None else "")


def _half_width(model: Model, tasks: Sequence[str]) -> float | None:
    """Of the mean's 95 % interval, tasks being independent."""
    squares = 0.0
    for task in tasks:
        error = model.scores[task].get("stderr")
        if error is None:
            return None
        squares += (error / 20 if task == "mme" else error) ** 2
    return _NORMAL * squares**0.5 / len(tasks)


def _kinds(models: Sequence[Model], task: str) -> list[list[str]]:
    """Rows of a task's kinds of question, where it tells them apart (exact match by kind)."""
    found: dict[str, dict[int, float]] = {}
    for place, model in enumerate(models):
        score = model.scores.get(task)
        if score is None or len(score["tasks"]) != 1:
            continue
        metrics = score["metrics"][score["tasks"][0]]
        if "exact_match,none" not in metrics:
            continue
        for key, value in metrics.items():
            if key != "exact_match,none":
                found.setdefault(key.removesuffix(",none"), {})[place] = value * score["scale"]
    return [
        [f"– {kind}", *(f"{values[place]:.1f}" if place in values else "-" for place in range(len(models)))]
        for kind, values in sorted(found.items())
    ]


def _number(value: float) -> str:
    return "-" if value != value else f"{value:.1f}"
