"""An evaluation as tables: for the terminal and in Markdown."""

from __future__ import annotations

from rich.table import Table

from pmod_cli.evaluation.results import EvalResult, Score, TaskResult


def table(result: EvalResult) -> Table:
    """The requested tasks, one a row."""
    built = Table(title="Scores in points", title_justify="left")
    header, rows = _cells(result)
    for index, title in enumerate(header):
        built.add_column(title, justify="left" if index < 2 else "right")
    for row in rows:
        built.add_row(*row)
    return built


def markdown(result: EvalResult) -> str:
    """The same as a Markdown table."""
    header, rows = _cells(result)
    lines = [header, ["---", "---", *["---:"] * (len(header) - 2)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _cells(result: EvalResult) -> tuple[list[str], list[list[str]]]:
    compared = result.baseline is not None
    header = ["task", "metric", "samples", *(["baseline"] if compared else []), "model"]
    rows = []
    if compared:
        header += ["difference", "95 % interval"]
    for task in result.tasks:
        row = [task.name, task.metric.removesuffix(",none"), str(task.model.samples)]
        if task.baseline:
            row.append(_score(task.baseline))
        row.append(_score(task.model))
        if compared:
            row += _difference(task)
        rows.append(row)
        rows += _parts(task, len(header))
    return header, rows


def _parts(task: TaskResult, width: int) -> list[list[str]]:
    """Further numbers of a local task (by kind of question), or a group's parts, indented."""
    return []


def _score(score: Score) -> str:
    if score.value is None:
        return f"{score.failed} failed" if score.failed else "none"
    return f"{score.value:.1f}" + (f" ± {score.stderr:.1f}" if score.stderr is not None else "")


def _difference(task: TaskResult) -> list[str]:
    if task.difference is None:
        values = (task.model.value, task.baseline.value if task.baseline else None)
        if values[0] is None or values[1] is None:
            return ["", ""]
        return [f"{values[0] - values[1]:+.1f}", ""]
    return [f"{task.difference.points:+.1f}", f"{task.difference.low:+.1f} to {task.difference.high:+.1f}"]
