"""What an evaluation gives: scores with their errors, by task and by model, and where they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pmod_cli.evaluation import stats
from pmod_cli.evaluation.harness import TaskRun
from pmod_cli.evaluation.metrics import Metric, metric_of, sample_score, strata_of
from pmod_cli.evaluation.stats import Difference, Strata, Stratum

Errors = dict[str, dict[str, dict[str, str]]]
"""By role, task, and what went wrong."""


@dataclass(frozen=True)
class Score:
    """One model's score on one task, or on a group of tasks.

    Attributes:
        value: In points, usually percent; None if any sample failed, or if lmms-eval gave no number.
        stderr: Bootstrap standard error.
        samples: How many were evaluated.
        failed: How many raised, or could not be scored.
        metrics: All of lmms-eval's numbers by task.
        strata: What the score is made of.
    """

    value: float | None
    stderr: float | None
    samples: int
    failed: int
    metrics: dict[str, dict[str, float]]
    strata: Strata | None = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Without the strata."""
        return {key: value for key, value in vars(self).items() if key != "strata"}


@dataclass(frozen=True)
class TaskResult:
    """A requested task's row.

    Attributes:
        name: As it was asked for.
        tasks: The tasks behind the name.
        metric: What the score is, as lmms-eval names it.
        scale: What lmms-eval's number is multiplied with to be in points.
        model: The model's score.
        baseline: The baseline's score, if there is one.
        difference: Model less baseline.
    """

    name: str
    tasks: list[str]
    metric: str
    scale: float
    model: Score
    baseline: Score | None = None
    difference: Difference | None = None

    def to_dict(self) -> dict[str, Any]:
        """As it stands in ``results.json``."""
        difference = self.difference
        return vars(self) | {
            "model": self.model.to_dict(),
            "baseline": self.baseline.to_dict() if self.baseline else None,
            "difference": vars(difference) | {"significant": difference.significant} if difference else None,
        }


@dataclass(frozen=True)
class PaperRow:
    """One line of the paper's tables.

    Attributes:
        label: Whose scores.
        values: By column; None where there is none.
        average: Over all columns, or None if one is missing.
    """

    label: str
    values: dict[str, float | None]
    average: float | None


@dataclass(frozen=True)
class EvalResult:
    """A whole evaluation.

    Attributes:
        tasks: One result per requested task, in the order asked for.
        complete: Whether all requested tasks are among them.
        model: What was evaluated: path, fingerprint, how it ran.
        baseline: The same of the baseline.
        environment: Versions, seeds, number of processes.
        settings: What the user asked for.
        task_info: Version, generation settings and data of each task.
        failures: Errors by role, task and failed sample.
        broken_metrics: Errors by role, task and metric whose aggregation raised.
        started: When, in UTC.
        seconds: Wall time.
        paper: The paper's two tables, if all of its tasks were evaluated.
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
    paper: list[list[PaperRow]] = field(default_factory=list)

    @property
    def failed_samples(self) -> int:
        """Samples that raised, over all tasks and both models."""
        return sum(len(errors) for tasks in self.failures.values() for errors in tasks.values())

    @property
    def first_failure(self) -> str | None:
        """The first of them, in words."""
        first = _first(self.failures)
        return f"the first is {first}" if first else None

    @property
    def first_broken_metric(self) -> str | None:
        """The first metric that could not be aggregated, in words."""
        return _first(self.broken_metrics)

    @property
    def without_score(self) -> list[str]:
        """Requested tasks that have no score, for either model."""
        return [
            task.name
            for task in self.tasks
            if task.model.value is None or (task.baseline and task.baseline.value is None)
        ]

    def to_dict(self) -> dict[str, Any]:
        """As it stands in ``results.json``; the schema is in ``docs/json.md``."""
        return vars(self) | {
            "tasks": [task.to_dict() for task in self.tasks],
            "paper": [[vars(row) for row in table] for table in self.paper],
            "failed_samples": self.failed_samples,
            "seconds": round(self.seconds, 3),
        }


def _first(errors: Mapping[str, Mapping[str, Mapping[str, str]]]) -> str | None:
    for role, tasks in errors.items():
        for task, named in tasks.items():
            for name, error in named.items():
                return f"{role}, {task}, {name}: {error}"
    return None


def score_task(runs: Sequence[TaskRun], configs: Sequence[dict[str, Any]]) -> tuple[Score, Metric | None]:
    """A requested task's score: of its one task, or the mean over its parts where it is a group.

    Args:
        runs: The runs of the tasks behind the name.
        configs: Their YAML.
    """
    metrics = [metric_of(run.task, config, run.metrics) for run, config in zip(runs, configs, strict=True)]
    failed = sum(len(run.failures) for run in runs)
    values = [
        run.metrics[metric.key] * metric.scale
        for run, metric in zip(runs, metrics, strict=True)
        if metric and metric.key in run.metrics
    ]
    complete = not failed and len(values) == len(runs)
    strata = _merge(runs, metrics) if complete else None
    score = Score(
        value=sum(values) / len(values) if complete else None,
        stderr=stats.standard_error(strata) if strata else None,
        samples=sum(len(run.samples) for run in runs),
        failed=failed,
        metrics={run.task: run.metrics for run in runs},
        strata=strata,
    )
    return score, metrics[0]


def compare(model: Score, baseline: Score | None) -> Difference | None:
    """The model's score less the baseline's; None without a baseline, or if what a score is made of is not known."""
    if baseline is None or model.strata is None or baseline.strata is None:
        return None
    return stats.difference(model.strata, baseline.strata)


def sample_rows(run: TaskRun, metric: Metric | None) -> list[dict[str, Any]]:
    """A task's samples with the score of each."""
    return [sample | {"score": sample_score(metric, sample) if metric else None} for sample in run.samples]


def _merge(runs: Sequence[TaskRun], metrics: Sequence[Metric | None]) -> Strata | None:
    merged: dict[str, Stratum] = {}
    for run, metric in zip(runs, metrics, strict=True):
        strata = strata_of(metric, run.samples) if metric else None
        if strata is None:
            return None
        for name, stratum in strata.items():
            merged[f"{run.task}/{name}"] = Stratum(stratum.weight / len(runs), stratum.units)
    return merged
