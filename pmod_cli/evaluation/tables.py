"""An evaluation as tables: for the terminal, and in Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pmod_cli.evaluation import paper
from pmod_cli.evaluation.results import EvalResult, Score, TaskResult
from pmod_cli.evaluation.stats import RESAMPLES
from pmod_cli.output.tables import Table


def tables(result: EvalResult, errors: bool) -> Iterator[Table]:
    """All tables of an evaluation, with standard errors or, where they would not fit beside a baseline, without."""
    sides = ["baseline", "model"] if result.baseline else ["model"]
    header = ["task", "samples", *sides, *(["difference"] if result.baseline else [])]
    rows: list[list[str]] = []
    for task in result.tasks:
        scores = [_score(getattr(task, side), errors) for side in sides]
        rows.append([task.name, str(task.model.samples), *scores, _difference(task)][: len(header)])
        rows += ([*cells, *[""] * len(header)][: len(header)] for cells in _parts(task, sides))
    yield Table("Scores in points", header, rows)
    for number, lines in enumerate(paper.tables(result), start=1):
        rows = []
        for label, values, average in lines:
            sign = "+" if "difference" in label else ""
            points = [*values.values(), average]
            rows.append([label, *("" if value is None else f"{value:{sign}.1f}" for value in points)])
        yield Table(f"The paper's table {number}", ["", *lines[0].values, "average"], rows)


def notes(result: EvalResult) -> list[str]:
    """What a reader of the tables has to know."""
    lines = [f"± is the standard error (bootstrap over samples, {RESAMPLES} resamples)."]
    if any(task.difference for task in result.tasks):
        lines.append(
            "Difference: model less baseline, with the 95 % interval of a paired bootstrap; * where it excludes 0."
        )
    if paper.tables(result):
        lines += paper.notes(result)
    for role, side in (("baseline", result.baseline), ("model", result.model)):
        if recalled := (side or {}).get("answers", {}).get("recalled"):
            lines.append(f"{role}: {recalled} answers were kept from an earlier run of the same checkpoint.")
    differing = []
    if result.baseline and "dtype" in result.model:  # not while only the baseline has run
        ours, theirs = (
            {"dtype": side["dtype"]} | side["preparation"] for side in (result.model, result.baseline)
        )
        differing = [
            f"{key.replace('_', ' ')}: {value} and {theirs[key]}"
            for key, value in ours.items()
            if value != theirs[key]
        ]
    if differing:
        lines.append(
            f"Model and baseline do not run alike ({', '.join(differing)}): scores may differ for that reason."
        )
    return lines


def markdown(result: EvalResult) -> str:
    """The whole report."""
    about = [
        f"- {role}: `{described['source']}`, fingerprint `{str(described['fingerprint'])[:16]}`"
        for role in ("model", "baseline")
        if (described := getattr(result, role))
    ]
    if not result.complete:
        about.append("- **not finished**: some of the tasks asked for are not below")
    parts = ["# Evaluation", "\n".join(about)]
    for table in tables(result, errors=True):
        parts += [f"## {table.title}", Table("", table.header, table.rows).to_markdown()]
    environment = [f"{name} {value}" for name, value in result.environment.items() if name != "seeds"]
    parts.append("\n".join(f"- {line}" for line in [*notes(result), ", ".join(environment)]))
    return "\n\n".join(parts) + "\n"


def changes_table(changes: list[dict[str, Any]]) -> Table:
    """Samples whose score changed, as `pmod_cli.evaluation.diff.differences` gives them."""
    header = ["task", "sample", "before", "after", "right", "question", "picture"]
    rows = []
    for change in changes:
        answers = [
            f"{_cut(side['answer'])} ({side['score']:.2g})" for side in (change["before"], change["after"])
        ]
        asked = [_cut(change["target"]), _cut(change["prompt"], 40), " ".join(change["pictures"])]
        rows.append([change["task"], str(change["doc_id"]), *answers, *asked])
    return Table("Samples whose score changed", header, rows, left=len(header))


def _parts(task: TaskResult, sides: list[str]) -> Iterator[list[str]]:
    """Further numbers of a task that has several, indented: parts of a group, or kinds of question."""
    if len(task.tasks) > 1:
        keys = {leaf: (leaf, task.metric) for leaf in task.tasks}
    elif task.metric == "exact_match,none":
        [leaf] = task.tasks
        kinds = [key for key in task.model.metrics[leaf] if key != task.metric]
        keys = {key.removesuffix(",none"): (leaf, key) for key in kinds}
    else:
        return  # the others are other metrics over the same samples, to be found in results.json
    for label, (leaf, key) in keys.items():
        scores = [getattr(task, side) for side in sides]
        values = [score.metrics[leaf].get(key) if score else None for score in scores]
        yield [f"  {label}", "", *("" if value is None else f"{value * task.scale:.1f}" for value in values)]


def _score(score: Score | None, errors: bool) -> str:
    if score is None:
        return ""
    if score.value is None:
        return f"{score.failed} failed" if score.failed else "none"
    return f"{score.value:.1f}" + (f" ± {score.stderr:.1f}" if errors and score.stderr is not None else "")


def _difference(task: TaskResult) -> str:
    if found := task.difference:
        star = " *" if found.significant else ""
        return f"{found.points:+.1f} ({found.low:+.1f} to {found.high:+.1f}){star}"
    if task.baseline is None or task.baseline.value is None or task.model.value is None:
        return ""
    return f"{task.model.value - task.baseline.value:+.1f}"


def _cut(value: object, length: int = 24) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= length else text[: length - 1] + "…"
