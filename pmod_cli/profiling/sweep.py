"""Profiles over a range: of ratios, text tokens or batch sizes; and schedules compared at equal mean retention."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from pmod_cli.modeling.schedule import SCHEDULES, Ratios, mean_retention
from pmod_cli.output.errors import PmodError
from pmod_cli.profiling.profile import Settings, profile
from pmod_cli.profiling.result import FLOPS_PER_MAC
from pmod_cli.profiling.subject import Subject

KNOBS: dict[str, tuple[float, ...]] = {
    "ratio": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    "tokens": (16, 32, 64, 128, 256, 512, 1024),
    "batch": (1, 2, 4, 8, 16),
}
"""What can be swept, and over which values."""


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
        One row per value: the value under the knob's name, the ratios of p-MoD to dense, and under ``pmod`` and
        ``dense`` each model's ``prefill_macs``, ``prefill_flops`` and ``kv_prefill_bytes``.

    Raises:
        PmodError: Only one model.
    """
    own = _own_ratios(subject)
    rows = []
    for value in KNOBS[knob]:
        if progress:
            progress(f"{knob} {value}")
        if knob == "ratio":
            varied = with_ratios(subject, [None if ratio is None else value for ratio in own])
            row = _row(varied, settings, measure_options)
        else:
            change: dict[str, Any] = {"text_tokens" if knob == "tokens" else "batch": value}
            row = _row(subject, dataclasses.replace(settings, **change), measure_options)
        rows.append({knob: value, **row})
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
        One row per schedule: ``schedule``, ``setting`` (the parameter that was solved for),
        ``mean_retention``, ``mod_layers``, and what `sweep` gives; the subject's own first. A
        kind that cannot reach the mean is left out.

    Raises:
        PmodError: If there is only one model.
    """
    own = _own_ratios(subject)
    candidates: list[tuple[str, dict[str, float], Ratios]] = [("this model", {}, own)]
    for name, schedule in SCHEDULES.items():
        accepted = inspect.signature(schedule).parameters
        parameter = next((each for each in ("shift", "ratio") if each in accepted), None)
        if parameter and (solved := _solve(name, parameter, len(own), mean_retention(own))):
            candidates.append((name, {parameter: solved[0]}, solved[1]))
    rows = []
    for name, setting, ratios in candidates:
        if progress:
            progress(name)
        rows.append(
            {
                "schedule": name,
                "setting": setting,
                "mean_retention": mean_retention(ratios),
                "mod_layers": sum(ratio is not None for ratio in ratios),
                **_row(with_ratios(subject, ratios), settings, measure_options),
            }
        )
    return rows


def with_ratios(subject: Subject, ratios: Ratios) -> Subject:
    """The same subject with other retention ratios."""
    assert subject.pmod is not None
    assert subject.pmod.mod is not None
    mod = dataclasses.replace(subject.pmod.mod, retention_ratios=ratios)
    return dataclasses.replace(subject, pmod=dataclasses.replace(subject.pmod, mod=mod))


def _own_ratios(subject: Subject) -> Ratios:
    if subject.pmod is None or subject.pmod.mod is None or subject.dense is None:
        raise PmodError("--sweep and --schedules compare a p-MoD model with its dense baseline")
    return subject.pmod.mod.retention_ratios


def _row(subject: Subject, settings: Settings, measure_options: dict[str, Any] | None) -> dict[str, Any]:
    """The ratios, and each model's MACs, FLOPs and cache."""
    # The formula agrees with fvcore's trace (a test says so) and takes no time.
    result = profile(subject, dataclasses.replace(settings, counter="formula"), measure_options)
    figures = {
        role: {
            "prefill_macs": variant.prefill.macs,
            "prefill_flops": FLOPS_PER_MAC * variant.prefill.macs,
            "kv_prefill_bytes": sum(variant.kv_prefill),
        }
        for role, variant in result.variants.items()
    }
    return {**result.ratios, **figures}


def _solve(name: str, parameter: str, layers: int, target: float) -> tuple[float, Ratios] | None:
    """The parameter in (0, 1] whose schedule has this mean retention, by bisection; None if none has.

    The mean never falls as the parameter grows, but jumps where a layer turns dense, so it may be missed.
    """

    def schedule(value: float) -> Ratios:
        return SCHEDULES[name](layers, **{parameter: value})

    low, high = 1e-6, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if mean_retention(schedule(middle)) < target:
            low = middle
        else:
            high = middle
    ratios = schedule(high)
    return (high, ratios) if abs(mean_retention(ratios) - target) < 0.01 else None
