"""Profiles over a range: of ratios, text tokens or batch sizes; and schedules compared at equal mean retention."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from pmod_cli.modeling.schedule import SCHEDULES, Ratios, mean_retention
from pmod_cli.output.errors import PmodError
from pmod_cli.profiling.profile import Settings, profile_subject
from pmod_cli.profiling.result import FLOPS_PER_MAC, ProfileResult
from pmod_cli.profiling.subject import Subject

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
TEXT_TOKENS = (16, 32, 64, 128, 256, 512, 1024)
BATCHES = (1, 2, 4, 8, 16)


def sweep(
    subject: Subject,
    settings: Settings,
    knob: str,
    measure_options: dict[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Vary one thing and profile each.

    Args:
        subject: The models, both.
        settings: Everything that stays.
        knob: ``ratio`` (every MoD layer keeps this share), ``tokens`` (text tokens of the prompt) or ``batch``.
        measure_options: Options of `measure`; None to count only.
        progress: Called with a short text at each step.

    Returns:
        One row a value: the value under the knob's name, the ratios of p-MoD to dense, and under ``pmod`` and
        ``dense`` each model's ``prefill_macs``, ``prefill_flops`` and ``kv_prefill_bytes``.

    Raises:
        PmodError: An unknown knob, or only one model.
    """
    subjects, settings_list = [subject], [settings]
    if knob == "ratio":
        subjects = [with_ratios(subject, _uniform(subject, ratio)) for ratio in RATIOS]
        values: tuple[float, ...] = RATIOS
        settings_list *= len(values)
    elif knob in ("tokens", "batch"):
        values = TEXT_TOKENS if knob == "tokens" else BATCHES
        changes: list[dict[str, Any]] = [
            {"text_tokens" if knob == "tokens" else "batch": value} for value in values
        ]
        settings_list = [dataclasses.replace(settings, **change) for change in changes]
        subjects *= len(values)
    else:
        raise PmodError(f"cannot sweep {knob!r}", "one of ratio, tokens, batch")
    rows = []
    for value, one, chosen in zip(values, subjects, settings_list, strict=True):
        # The formula agrees with fvcore's trace (a test says so) and takes no time.
        quick = dataclasses.replace(chosen, counter="formula")
        if progress:
            progress(f"{knob} {value}")
        result = profile_subject(one, quick, measure_options)
        if not result.ratios:
            raise PmodError("a sweep compares a p-MoD model with its dense baseline")
        rows.append({knob: value, **result.ratios, **_work(result)})
    return rows


def compare_schedules(
    subject: Subject,
    settings: Settings,
    measure_options: dict[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Profile each kind of schedule, set to the subject's own mean retention.

    Args:
        subject: The models; the p-MoD model's mean retention is the target.
        settings: The prompt.
        measure_options: Options of `measure`; None to count only.
        progress: Called with a short text at each step.

    Returns:
        One row a schedule: ``schedule``, ``setting`` (the parameter that was solved for),
        ``mean_retention``, ``mod_layers``, and what `sweep` gives; the subject's own first. A
        kind that cannot reach the mean is left out.

    Raises:
        PmodError: If there is only one model.
    """
    if subject.pmod is None or subject.pmod.mod is None or subject.dense is None:
        raise PmodError("comparing schedules needs a p-MoD model and its dense baseline")
    own = subject.pmod.mod.retention_ratios
    target = mean_retention(own)
    candidates: list[tuple[str, dict[str, float], Ratios]] = [("this model", {}, own)]
    layers = subject.pmod.geometry.decoder.layers
    for name, schedule in SCHEDULES.items():
        parameter = next(
            (each for each in ("shift", "ratio") if each in inspect.signature(schedule).parameters), None
        )
        if parameter is None:
            continue
        found = _solve(partial(_schedule, name, parameter, layers), target)
        if found is not None:
            candidates.append((name, {parameter: found[0]}, found[1]))
    rows = []
    for name, setting, ratios in candidates:
        if progress:
            progress(name)
        quick = dataclasses.replace(settings, counter="formula")
        result = profile_subject(with_ratios(subject, ratios), quick, measure_options)
        rows.append(
            {
                "schedule": name,
                "setting": setting,
                "mean_retention": mean_retention(ratios),
                "mod_layers": sum(ratio is not None for ratio in ratios),
                **result.ratios,
                **_work(result),
            }
        )
    return rows


def _work(result: ProfileResult) -> dict[str, dict[str, int]]:
    return {
        role: {
            "prefill_macs": variant.prefill.macs,
            "prefill_flops": FLOPS_PER_MAC * variant.prefill.macs,
            "kv_prefill_bytes": sum(variant.kv_prefill),
        }
        for role, variant in result.variants.items()
    }


def with_ratios(subject: Subject, ratios: Ratios) -> Subject:
    """The same subject with other retention ratios."""
    assert subject.pmod is not None
    assert subject.pmod.mod is not None
    mod = dataclasses.replace(subject.pmod.mod, retention_ratios=ratios)
    return dataclasses.replace(subject, pmod=dataclasses.replace(subject.pmod, mod=mod))


def _uniform(subject: Subject, ratio: float) -> Ratios:
    if subject.pmod is None or subject.pmod.mod is None:
        raise PmodError("a sweep compares a p-MoD model with its dense baseline")
    return [None if own is None else ratio for own in subject.pmod.mod.retention_ratios]


def _schedule(name: str, parameter: str, layers: int, value: float) -> Ratios:
    return SCHEDULES[name](layers, **{parameter: value})


def _solve(schedule: Callable[[float], Ratios], target: float) -> tuple[float, Ratios] | None:
    """The parameter in (0, 1] whose schedule has this mean retention, by bisection; None if none has.

    The mean never falls as the parameter grows, but jumps where a layer turns dense, so it may be missed.
    """
    low, high = 1e-6, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if mean_retention(schedule(middle)) < target:
            low = middle
        else:
            high = middle
    ratios = schedule(high)
    return (high, ratios) if abs(mean_retention(ratios) - target) < 0.01 else None
