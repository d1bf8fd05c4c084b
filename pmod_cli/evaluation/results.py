"""What an evaluation gives: scores with their errors, by task and by model, and where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pmod_cli.evaluation import paper, stats
from pmod_cli.evaluation.harness import TaskRun
from pmod_cli.evaluation.metrics import strata_of
from pmod_cli.evaluation.stats import Difference, Strata, Stratum

Errors = dict[str, dict[str, dict[str, str]]]
"""By role, task, and what went wrong."""


@dataclass(frozen=True)
class Score:
    """One model's score on one task, or on a group of tasks.

    ``value`` is in points, usually percent; None if any sample failed, or if lmms-eval gave no number. ``stderr`` is by
    bootstrap, ``metrics`` are all of lmms-eval's numbers by task, ``strata`` what the score is made of.
    """

    value: float | None
    stderr: float | None
    samples: int
    failed: int
    metrics: dict[str, dict[str, float]]
    strata: Strata | None = field(repr=False)

    @classmethod
    def of(cls, runs: Sequence[TaskRun]) -> Score:
        """The score of the tasks behind a name: of its one task, or the mean over its parts where it is a group."""
        failed = sum(len(run.failures) for run in runs)
        points = [run.points for run in runs if run.points is not None]
        complete = not failed and len(points) == len(runs)
        strata = _merge(runs) if complete else None
        return cls(
            value=sum(points) / len(points) if complete else None,
            stderr=stats.standard_error(strata) if strata else None,
            samples=sum(len(run.samples) for run in runs),
            failed=failed,
            metrics={run.task: run.metrics for run in runs},
            strata=strata,
        )

    def to_dict(self) -> dict[str, Any]:
        """Without the strata."""
        return {key: value for key, value in vars(self).items() if key != "strata"}


def _merge(runs: Sequence[TaskRun]) -> Strata | None:
    merged: dict[str, Stratum] = {}
    for run in runs:
        strata = strata_of(run.metric, run.samples)
        if strata is None:
            return None
        for name, stratum in strata.items():
            merged[f"{run.task}/{name}"] = Stratum(stratum.weight / len(runs), stratum.units)
    return merged


@dataclass(frozen=True)
class TaskResult:
    """A requested task's row: the name as it was asked for, and the tasks behind it.

    ``metric`` is the score as lmms-eval names it, ``scale`` what its number is multiplied with to be in points.
    ``difference`` is None without a baseline, or if what a score is made of is not known.
    """

    name: str
    tasks: list[str]
    metric: str
    scale: float
    model: Score
    baseline: Score | None = None
    difference: Difference | None = None

    @classmethod
    def of(cls, name: str, runs: Sequence[TaskRun], baseline: Sequence[TaskRun]) -> TaskResult:
        """The row of a name, from the runs of the tasks behind it; those of the baseline may be none."""
        model, other = Score.of(runs), Score.of(baseline) if baseline else None
        ours, theirs = model.strata, other.strata if other else None
        metric = runs[0].metric
        return cls(
            name=name,
            tasks=[run.task for run in runs],
            metric=metric.key if metric else "none",
            scale=metric.scale if metric else 1.0,
            model=model,
            baseline=other,
            difference=None if ours is None or theirs is None else stats.difference(ours, theirs),
        )

    def to_dict(self) -> dict[str, Any]:
        """As it stands in ``results.json``."""
        difference = self.difference
        return vars(self) | {
            "model": self.model.to_dict(),
            "baseline": self.baseline.to_dict() if self.baseline else None,
            "difference": difference._asdict() | {"significant": difference.significant}
            if difference
            else None,
        }


@dataclass(frozen=True)
class EvalResult:
    """A whole evaluation.

    ``tasks`` has one result per requested task, in the order asked for; ``complete`` says whether all are there.
    ``model`` and ``baseline`` say what was evaluated and how it ran, ``environment`` with which versions, seeds and
    number of processes, ``settings`` what the user asked for, ``task_info`` the version, generation settings and data
    of each task. ``failures`` are errors by failed sample, ``broken_metrics`` by metric whose aggregation raised.
    ``started`` is in UTC.
    """

    tasks: list[TaskResult]
    complete: bool
    model: dict[str, Any]
    baseline: dict[str, Any] | None
    environment: dict[str, Any]
    settings: dict[str, Any]
    task_info: dict[str, dict[str, Any]]
    failures: Errors
    broken_metrics: Errors
    started: str
    seconds: float

    @property
    def failed_samples(self) -> int:
        """Samples that raised, over all tasks and both models."""
        return sum(len(errors) for tasks in self.failures.values() for errors in tasks.values())

    @property
    def first_failure(self) -> str | None:
        """The first of them, in words."""
        return f"the first is {_first(self.failures)}" if self.failed_samples else None

    @property
    def first_broken_metric(self) -> str | None:
        """The first metric that could not be aggregated, in words."""
        return _first(self.broken_metrics)

    @property
    def without_score(self) -> list[str]:
        """Requested tasks that have no score, for either model."""
        scores = {task.name: (task.model, task.baseline) for task in self.tasks}
        return [name for name, sides in scores.items() if any(side and side.value is None for side in sides)]

    def to_dict(self) -> dict[str, Any]:
        """As it stands in ``results.json``; the schema is in ``docs/json.md``."""
        return vars(self) | {
            "tasks": [task.to_dict() for task in self.tasks],
            "paper": [[row._asdict() for row in table] for table in paper.tables(self)],
            "failed_samples": self.failed_samples,
            "seconds": round(self.seconds, 3),
        }


def _first(errors: Errors) -> str | None:
    named = (
        f"{role}, {task}, {name}: {error}"
        for role, tasks in errors.items()
        for task, found in tasks.items()
        for name, error in found.items()
    )
    return next(named, None)
