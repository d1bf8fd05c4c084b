"""An evaluation as tables: for the terminal, and in Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.table import Table

from pmod_cli.evaluation import paper
from pmod_cli.evaluation.paper import PaperRow
from pmod_cli.evaluation.results import EvalResult, Score, TaskResult
from pmod_cli.evaluation.stats import RESAMPLES

Grid = tuple[str, list[str], list[list[str]]]
"""Title, header, rows."""


def tables(result: EvalResult) -> list[Table]:
    """All tables of a report."""
    return [_rich(grid) for grid in _grids(result, errors=not result.baseline)]


def notes(result: EvalResult) -> list[str]:
    """What a reader of the tables has to know."""
    compared = any(task.difference for task in result.tasks)
    told = [f"± is the standard error (bootstrap over samples, {RESAMPLES} resamples)."]
    if compared:
        told.append(
            "Difference: model less baseline, with the 95 % interval of a paired bootstrap; * where it leaves out 0."
        )
    if paper.tables(result):
        told += paper.notes(result)
    return told + _how(result)


def _how(result: EvalResult) -> list[str]:
    """How the answers came about."""
    told = []
    for role in ("baseline", "model"):
        described = getattr(result, role) or {}
        gain = described.get("batch", {}).get("gain")
        if gain:
            told.append(
                f"{role}: {gain['batched']:.3g} samples/s in a batch of {gain['batch']}, "
                f"{gain['alone']:.3g} one at a time ({gain['timed_alone']} timed): {gain['factor']:.1f} times as fast."
            )
        if recalled := described.get("answers", {}).get("recalled"):
            told.append(f"{role}: {recalled} answers were kept from an earlier run of the same checkpoint.")
    differing = _differing_preparation(result)
    if differing:
        told.append(f"Model and baseline do not run alike ({differing}): scores may differ for that.")
    return told


def _differing_preparation(result: EvalResult) -> str:
    if not result.baseline:
        return ""
    ours, theirs = (
        {"dtype": side.get("dtype")} | side.get("preparation", {}) for side in (result.model, result.baseline)
    )
    return ", ".join(
        f"{key.replace('_', ' ')}: {ours[key]} and {theirs.get(key)}"
        for key in ours
        if ours[key] != theirs.get(key)
    )


def markdown(result: EvalResult) -> str:
    """The whole report."""
    parts = ["# Evaluation\n"]
    for role in ("model", "baseline"):
        described = getattr(result, role)
        if described:
            parts.append(
                f"- {role}: `{described['source']}`, fingerprint `{str(described['fingerprint'])[:16]}`"
            )
    if not result.complete:
        parts.append("- **not finished**: some of the tasks asked for are not below")
    for title, header, rows in _grids(result, errors=True):
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
        parts.append(f"\n## {title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines))
    parts.append("\n" + "\n".join(f"- {note}" for note in notes(result)))
    parts.append(
        "- " + ", ".join(f"{name} {value}" for name, value in result.environment.items() if name != "seeds")
    )
    return "\n".join(parts) + "\n"


def diff_table(changes: list[dict[str, Any]]) -> Table:
    """Samples whose score changed."""
    return _rich(
        (
            "Samples whose score changed",
            ["task", "sample", "before", "after", "right", "question", "picture"],
            [
                [
                    change["task"],
                    str(change["doc_id"]),
                    _short(change["before"]),
                    _short(change["after"]),
                    _cut(str(change["target"])),
                    _cut(change["prompt"], 40),
                    " ".join(change["pictures"]),
                ]
                for change in changes
            ],
        )
    )


def _grids(result: EvalResult, errors: bool) -> Iterator[Grid]:
    """The tables' contents; with standard errors beside scores, or without where they would not fit a terminal."""
    header = ["task", "samples", *(["baseline"] if result.baseline else []), "model"]
    if result.baseline:
        header.append("difference")
    rows = []
    for task in result.tasks:
        scores = [task.baseline, task.model] if result.baseline else [task.model]
        row = [task.name, str(task.model.samples), *(_score(score, errors) for score in scores if score)]
        rows.append(row + ([_difference(task)] if result.baseline else []))
        rows += _parts(task, bool(result.baseline))
    yield "Scores in points", header, rows
    for number, table in enumerate(paper.tables(result), start=1):
        columns = [*table[0].values]
        yield f"The paper's table {number}", ["", *columns, "average"], [_paper_row(row) for row in table]


def _parts(task: TaskResult, compared: bool) -> Iterator[list[str]]:
    """Further numbers of a task that has several, indented: parts of a group, or kinds of question."""
    if len(task.tasks) == 1:
        leaf = task.tasks[0]
        names = [key for key in task.model.metrics[leaf] if key != task.metric]
        if task.metric != "exact_match,none":
            return  # the others are other metrics over the same samples, to be found in results.json
        keys = {name.removesuffix(",none"): (leaf, name) for name in names}
    else:
        keys = {leaf: (leaf, task.metric) for leaf in task.tasks}
    for label, (leaf, key) in keys.items():
        sides = [task.baseline, task.model] if compared else [task.model]
        values = [side.metrics[leaf].get(key) if side else None for side in sides]
        cells = ["" if value is None else f"{value * task.scale:.1f}" for value in values]
        yield [f"  {label}", "", *cells, *([""] if compared else [])]


def _paper_row(row: PaperRow) -> list[str]:
    sign = "+" if "difference" in row.label else ""
    return [
        row.label,
        *("" if value is None else f"{value:{sign}.1f}" for value in row.values.values()),
        "" if row.average is None else f"{row.average:{sign}.1f}",
    ]


def _score(score: Score, errors: bool) -> str:
    if score.value is None:
        return f"{score.failed} failed" if score.failed else "none"
    return f"{score.value:.1f}" + (f" ± {score.stderr:.1f}" if errors and score.stderr is not None else "")


def _difference(task: TaskResult) -> str:
    found = task.difference
    if found:
        star = " *" if found.significant else ""
        return f"{found.points:+.1f} ({found.low:+.1f} to {found.high:+.1f}){star}"
    if task.baseline is None or task.baseline.value is None or task.model.value is None:
        return ""
    return f"{task.model.value - task.baseline.value:+.1f}"


def _rich(grid: Grid) -> Table:
    title, header, rows = grid
    built = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(header):
        built.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        built.add_row(*row)
    return built


def _short(side: dict[str, Any]) -> str:
    return f"{_cut(str(side['answer']))} ({side['score']:.2g})"


def _cut(text: str, length: int = 24) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"
