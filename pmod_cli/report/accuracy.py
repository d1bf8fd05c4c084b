"""Scores, differences to the dense model, accuracy against FLOPs, and the answers that changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pmod_cli import plots
from pmod_cli.evaluation.diff import Change, Comparison, compare_answers, pictures_of
from pmod_cli.evaluation.paper import JUDGED, TABLES, average
from pmod_cli.output.errors import PmodError
from pmod_cli.output.tables import Table
from pmod_cli.output.units import signed
from pmod_cli.published import COSTS, SCORES
from pmod_cli.report import figures
from pmod_cli.report.document import Block, Example, Notes, Section, Text
from pmod_cli.report.models import Model, answers, compare

_HALF_INTERVAL = 1.96
"""Half a 95 % interval, in standard errors."""

_EXAMPLES = 8
_PAPER_TASKS = {task: title for columns in TABLES for title, task in columns.items()} | {JUDGED: "MMB"}


def accuracy(models: Sequence[Model], other: Model | None) -> Section:
    """Scores with intervals, one column per model, and differences to the dense model."""
    tasks = list(dict.fromkeys(task for model in models for task in model.scores))
    if not tasks:
        return Section("Accuracy")
    header = ["", *(model.label for model in models)]
    rows: list[list[str]] = []
    for task in tasks:
        rows.append([task, *(_score(model.scores.get(task)) for model in models)])
        kinds = [_kinds(model, task) for model in models]
        for kind in sorted({kind for found in kinds for kind in found}):
            rows.append([f"– {kind}", *(f"{found[kind]:.1f}" if kind in found else "-" for found in kinds)])
    if len(tasks) > 1 and all(task in model.scores for task in tasks for model in models):
        means = [_mean(model, tasks) for model in models]
        rows.append(["mean", *("-" if mean is None else f"{mean:.1f}" for mean in means)])
    blocks: list[Block] = [Table("Scores in points", header, rows)]
    notes = ["± is half the 95 % interval (1.96 bootstrap standard errors over the samples)."]
    if other:
        others = [model for model in models if model is not other]
        gaps = [[task, *(_gap(model, other, task) for model in others)] for task in tasks]
        gaps = [row for row in gaps if any(cell != "-" for cell in row[1:])]
        if gaps:
            header = ["", *(model.label for model in others)]
            blocks.append(Table(f"Difference to {other.label}, in points", header, gaps))
            notes.append("95 % interval of a paired bootstrap over the samples; * where it excludes 0.")
    return Section("Accuracy", [*blocks, Notes(notes)])


def _score(score: dict[str, Any] | None) -> str:
    if score is None:
        return "-"
    if score["value"] is None:
        return f"{score['failed']} failed" if score.get("failed") else "none"
    error = score.get("stderr")
    return f"{score['value']:.1f}" + (f" ± {_HALF_INTERVAL * error:.1f}" if error is not None else "")


def _kinds(model: Model, task: str) -> dict[str, float]:
    """A task's scores by kind of question, where it tells them apart (exact match by kind)."""
    score = model.scores.get(task)
    if score is None or len(score["tasks"]) != 1:
        return {}
    metrics = dict(score["metrics"][score["tasks"][0]])
    if metrics.pop("exact_match,none", None) is None:
        return {}
    return {key.removesuffix(",none"): value * score["scale"] for key, value in metrics.items()}


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
            _mean(model, shared) or 0,
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
    drawn = figures.accuracy_figure(ours, theirs, together=together, what=what, caption=caption)
    return Section(title, [drawn])


def _mean(model: Model, tasks: Sequence[str]) -> float | None:
    """Mean over tasks, MME taken out of 100 instead of 2000; None if a score is missing."""
    return average({"MME" if task == "mme" else task: model.scores[task]["value"] for task in tasks})


def _half_width(model: Model, tasks: Sequence[str]) -> float | None:
    """Half the 95 % interval of the mean, tasks being independent; None if an error is not known."""
    squares = 0.0
    for task in tasks:
        error = model.scores[task].get("stderr")
        if error is None:
            return None
        squares += (error / 20 if task == "mme" else error) ** 2
    return _HALF_INTERVAL * squares**0.5 / len(tasks)


def _published(family: str, tasks: Sequence[str] | None) -> list[figures.Point]:
    """The paper's dense and p-MoD model of a family, on some of its tasks or on all."""
    if family not in COSTS or family not in SCORES:
        return []
    costs, points = COSTS[family], []
    for role, tera, name in (
        ("baseline", costs.dense_tflops, costs.model),
        ("model", costs.pmod_tflops, f"p-MoD-{costs.model}"),
    ):
        scores = SCORES[family][role]
        titles = scores if tasks is None else [_PAPER_TASKS[task] for task in tasks]
        mean = average({title: scores[title] for title in titles})
        points.append(figures.Point(f"{name} (paper)", tera * 1e12, mean or 0, None, role == "model"))
    return points


def differences(
    models: Sequence[Model],
    other: Model | None,
    include_path: str | Path | Sequence[str | Path] | None = None,
) -> Section:
    """For each p-MoD model what it gains and loses against the dense one; of the examples half are losses."""
    compared: list[tuple[Model, Model, Comparison, list[Change]]] = []
    for model in models:
        if other is None or not model.is_pmod:
            continue
        tasks = [task for task in model.samples if task in other.samples]
        ours, theirs = ({task: answers(side, task) for task in tasks} for side in (model, other))
        found = compare_answers(theirs, ours)
        if not found.compared:
            continue
        losses = found.worse[: max(_EXAMPLES // 2, _EXAMPLES - len(found.better))]
        compared.append((model, other, found, [*losses, *found.better[: _EXAMPLES - len(losses)]]))
    # At once, because lmms-eval reads all of its tasks each time.
    shown = {(change.task, change.doc_id) for *_, chosen in compared for change in chosen}
    pictures = _pictures(sorted(shown), include_path)
    blocks: list[Block] = []
    for model, dense, found, chosen in compared:
        words = (
            f"{model.label} against {dense.label}: of {found.compared} samples {len(found.better)} became right "
            f"or better, {len(found.worse)} wrong or worse."
        )
        blocks.append(Text(words))
        blocks += [
            Example(
                f"{change.task}-{change.doc_id}",
                f"{change.task}, sample {change.doc_id}: {'worse' if change.gain < 0 else 'better'}",
                [
                    ("question", str(change.after["prompt"])),
                    ("right", str(change.after["target"])),
                    (dense.label, f"{change.before['answer']} ({change.before['score']:.2g})"),
                    (model.label, f"{change.after['answer']} ({change.after['score']:.2g})"),
                ],
                pictures.get((change.task, change.doc_id), []),
            )
            for change in chosen
        ]
    return Section("Samples that differ", blocks)


def _pictures(
    wanted: Sequence[tuple[str, int]], include_path: str | Path | Sequence[str | Path] | None
) -> dict[tuple[str, int], list[bytes]]:
    """Pictures of documents, from the tasks' data; none where the data, or lmms-eval, are not there."""
    try:
        found = pictures_of(wanted, include_path)
    except (PmodError, OSError):
        return {}
    return {
        key: [plots.encode(picture, 480, 200 * 200) for picture in pictures]
        for key, pictures in found.items()
    }
