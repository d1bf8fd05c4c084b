"""Limits for CI: a score that has to be reached, a drop below the baseline that must not be exceeded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from pmod_cli.evaluation.results import EvalResult
from pmod_cli.output.errors import PmodError
from pmod_cli.recipe import nearest

FULL_MARKS = {"mme": 2000.0}
"""Best possible score of the tasks for which it is not 100; a drop is counted in percent of it."""


def parse_minimum(values: Iterable[str], tasks: Iterable[str]) -> dict[str, float]:
    """Read ``task=score`` pairs.

    Raises:
        PmodError: Not such a pair, or a task that is not evaluated.
    """
    known = list(tasks)
    minimum = {}
    for value in values:
        task, _, number = value.partition("=")
        try:
            minimum[task] = float(number)
            if math.isnan(minimum[task]):  # nothing is below it, so the gate would always be met
                raise ValueError
        except ValueError:
            raise PmodError(f"--min {value}: expected task=score", "e.g. --min gqa=60") from None
        if task not in known:
            near = nearest(task, known)
            raise PmodError(
                f"--min {value}: {task!r} is not among the tasks", f"did you mean {near}?" if near else None
            )
    return minimum


def check(result: EvalResult, minimum: Mapping[str, float], max_drop: float | None) -> list[str]:
    """What was not met, one sentence each.

    Args:
        result: The evaluation.
        minimum: Lowest allowed score by task, in points.
        max_drop: Largest allowed drop below the baseline, in percent of a task's best possible score.
    """
    missed = []
    for task in result.tasks:
        value = task.model.value
        if task.name in minimum and (value is None or value < minimum[task.name]):
            reached = "has no score" if value is None else f"reached {value:.2f}"
            missed.append(f"{task.name} {reached}, asked for {minimum[task.name]:g}")
        if max_drop is None:
            continue
        before = task.baseline.value if task.baseline else None
        if value is None or before is None:
            missed.append(f"{task.name} cannot be compared: a score is missing")
            continue
        drop = (before - value) * 100 / FULL_MARKS.get(task.name, 100.0)
        if drop > max_drop:
            missed.append(
                f"{task.name} dropped by {drop:.2f} ({before:.2f} to {value:.2f}), allowed {max_drop:g}"
            )
    return missed
