"""The models of a report: what each scored, what each costs, and which is compared with which."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pmod_cli.evaluation.diff import Answers, read_answers
from pmod_cli.evaluation.stats import Difference, Stratum, difference
from pmod_cli.output.errors import PmodError
from pmod_cli.report.collect import Evaluation, Found

_MOST_POINTS = 1e9


@dataclass
class Model:
    """One model that was evaluated.

    Attributes:
        source: Where it is, as the evaluation names it.
        model_type: transformers' name.
        ratios: Retention ratios by layer; None for a dense model.
        scores: By task, as in ``results.json``.
        samples: By task: where its answers are.
        label: Short name.
        flops: Of the prefill of one sample; None if no profile fits.
    """

    source: str
    model_type: str
    ratios: list[float | None] | None
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: dict[str, tuple[Evaluation, str]] = field(default_factory=dict)
    label: str = ""
    flops: float | None = None

    @property
    def is_pmod(self) -> bool:
        """Whether it routes."""
        return self.model_type.startswith("pmod_")

    @property
    def family(self) -> str:
        """``model_type`` of the dense model."""
        return self.model_type.removeprefix("pmod_")


def gather(found: Found) -> list[Model]:
    """One entry per model, over all evaluations; dense ones first."""
    models: dict[str, Model] = {}
    for evaluation in found.evaluations:
        for role in ("baseline", "model"):
            described = evaluation.result.get(role)
            if not described:
                continue
            source = str(described["source"])
            model = models.setdefault(
                str(described.get("fingerprint") or source),
                Model(source, str(described.get("model_type")), described.get("retention_ratios")),
            )
            for task in evaluation.result["tasks"]:
                if task.get(role):
                    _check_score(task[role])
                    model.scores[task["name"]] = task[role] | {"scale": task["scale"], "tasks": task["tasks"]}
                    model.samples |= dict.fromkeys(task["tasks"], (evaluation, role))
    gathered = sorted(models.values(), key=lambda model: model.is_pmod)
    costs = [cost for profile in found.profiles for cost in _costs(profile)]
    labels = short_names([model.source for model in gathered], found.names)
    for model, label in zip(gathered, labels, strict=True):
        model.label = label
        model.flops = _flops(model, costs)
    return gathered


def _check_score(score: dict[str, Any]) -> None:
    """Refuse a score that no figure can show."""
    for number in (score["value"], score["stderr"]):
        if number is not None and not abs(number) < _MOST_POINTS:
            raise PmodError(f"a score of {number}")


def _costs(profile: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], float]]:
    """Of a profile's models: ``dense`` or ``pmod``, what it says of it, and prefill FLOPs of one sample."""
    for role in ("dense", "pmod"):
        if side := profile.get(role):
            flops = side["prefill"]["flops"] / profile["workload"]["batch"]
            if math.isfinite(flops):  # 1e400, which no figure can show
                yield role, side, flops


def _flops(model: Model, costs: Sequence[tuple[str, dict[str, Any], float]]) -> float | None:
    """Prefill FLOPs of one sample, from the profile of this very model, else of one with the same ratios."""
    alike = None
    for role, side, flops in costs:
        if role != ("pmod" if model.is_pmod else "dense"):
            continue
        if side["name"] == model.source:
            return flops
        kind = side["model_type"].removeprefix("pmod_"), side["retention_ratios"]
        if alike is None and kind == (model.family, model.ratios):
            alike = flops
    return alike


def main_profile(found: Found) -> dict[str, Any] | None:
    """The profile that the report is about: the first with measured times, else the first."""
    return next((each for each in found.profiles if each.get("latency")), next(iter(found.profiles), None))


def main_model(models: list[Model], found: Found) -> Model | None:
    """The p-MoD model that the report is about: that of the main profile, else the last one that was trained."""
    profile = main_profile(found) or {}
    profiled = {(profile.get("pmod") or {}).get("name")}
    runs = [training for training in found.trainings if training.summary]
    trained = {
        str(run.path.resolve() if run.path.is_dir() else run.summary["result"]["output"]) for run in runs
    }
    return _named([model for model in reversed(models) if model.is_pmod], profiled, trained)


def reference(models: list[Model], found: Found) -> Model | None:
    """The dense model to compare with: the one that a profile or an evaluation names as baseline, else the first."""
    named = {(profile.get("dense") or {}).get("name") for profile in found.profiles}
    named |= {(evaluation.result.get("baseline") or {}).get("source") for evaluation in found.evaluations}
    return _named([model for model in models if not model.is_pmod], named)


def _named(models: list[Model], *names: set[Any]) -> Model | None:
    """The first model that is in the first set of names that has any, else the first."""
    return next(
        (
            model
            for some in names
            for model in models
            if some & {model.source, str(Path(model.source).resolve())}
        ),
        next(iter(models), None),
    )


def compare(model: Model, other: Model, task: str) -> Difference | None:
    """The model's score less the other's, paired over the samples of both; None if they were not kept.

    An evaluation of both at once has computed it; else it is computed here, for tasks whose score is the mean of
    their samples' scores.
    """
    for evaluation, _ in model.samples.values():
        baseline = evaluation.result.get("baseline") or {}
        for entry in evaluation.result["tasks"]:
            known = entry.get("difference")
            if entry["name"] == task and known and baseline.get("source") == other.source:
                return Difference(known["points"], known["low"], known["high"])
    ours, theirs = (_mean_of_samples(side, task) for side in (model, other))
    return difference({"all": ours}, {"all": theirs}) if ours and theirs else None


def answers(model: Model, task: str) -> Answers:
    """The model's answers to a task; empty if they were not kept."""
    if task not in model.samples:
        return {}
    evaluation, role = model.samples[task]
    return read_answers(evaluation.path, task, role)


def _mean_of_samples(model: Model, task: str) -> Stratum | None:
    score = model.scores.get(task)
    if score is None or score["value"] is None or len(score["tasks"]) != 1:
        return None
    values = {key: row["score"] for key, row in answers(model, score["tasks"][0]).items()}
    if not values or None in values.values():
        return None
    if abs(score["scale"] * sum(values.values()) / len(values) - score["value"]) > 1e-6:
        return None  # another kind of score
    return Stratum(score["scale"], {key: (float(value), 1.0) for key, value in values.items()})


def short_names(sources: Sequence[str], names: Mapping[str, str]) -> list[str]:
    """A label for each path: what it is called, else its last part and as many above as tell it from the others."""
    labels = []
    for place, source in enumerate(sources):
        parts = Path(source).parts
        others = [Path(other).parts for index, other in enumerate(sources) if index != place]
        length = 1
        while length < len(parts) and parts[-length:] in [other[-length:] for other in others]:
            length += 1
        labels.append(names.get(source) or "/".join(parts[-length:]) or source)
    return labels
