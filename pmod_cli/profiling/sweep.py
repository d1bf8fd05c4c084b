"""Profiles over a range: of ratios, text tokens or batch sizes; and schedules compared at equal mean retention."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from pmod_cli.modeling.schedule import SCHEDULES, Ratios, mean_retention
from pmod_cli.output.errors import PmodError
from pmod_cli.profiling.options import ProfileOptions
from pmod_cli.profiling.profile import profile
from pmod_cli.profiling.subject import Subject

KNOBS: dict[str, tuple[float, ...]] = {
    "ratio": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    "tokens": (16, 32, 64, 128, 256, 512, 1024),
    "batch": (1, 2, 4, 8, 16),
}
"""What can be swept, and over which values."""


def sweep(
    subject: Subject, options: ProfileOptions, knob: str, progress: Callable[[str], None] | None = None
) -> list[dict[str, Any]]:
    """Vary one thing and profile each, by formula: that takes no time.

    The ``knob`` is ``ratio`` (every MoD layer keeps this share), ``tokens`` (text tokens of the prompt), ``batch``, or
    ``schedules`` (each kind of schedule, set to the model's own mean retention).

    Returns:
        One row per value: the value under the knob's name (of a schedule see `_schedules`), the ratios of p-MoD to
        dense, and under ``pmod`` and ``dense`` each model's ``prefill_macs``, ``prefill_flops`` and
        ``kv_prefill_bytes``.

    Raises:
        PmodError: There is only one model.
    """
    if subject.pmod is None or subject.pmod.mod is None or subject.dense is None:
        raise PmodError("--sweep and --schedules compare a p-MoD model with its dense baseline")
    pmod, mod = subject.pmod, subject.pmod.mod
    options = replace(options, counter="formula")
    own = mod.retention_ratios
    cases: list[tuple[dict[str, Any], Ratios, ProfileOptions]]
    if knob == "schedules":
        cases = [(found, ratios, options) for found, ratios in _schedules(own)]
    elif knob == "ratio":
        kept = KNOBS[knob]
        cases = [({knob: v}, [None if ratio is None else v for ratio in own], options) for v in kept]
    else:
        field = {"tokens": "text_tokens"}.get(knob, knob)
        changes: list[dict[str, Any]] = [{field: value} for value in KNOBS[knob]]
        cases = [({knob: change[field]}, own, replace(options, **change)) for change in changes]
    rows = []
    for row, ratios, varied in cases:
        if progress:
            progress(f"{knob}: {next(iter(row.values()))}")
        routed = replace(subject, pmod=replace(pmod, mod=replace(mod, retention_ratios=ratios)))
        result = profile(routed, varied)
        sides = {
            role: {
                "prefill_macs": result[role]["prefill"]["macs"],
                "prefill_flops": result[role]["prefill"]["flops"],
                "kv_prefill_bytes": result[role]["kv_cache"]["prefill_bytes"],
            }
            for role in ("pmod", "dense")
        }
        rows.append(row | result["ratios"] | sides)
    return rows


def _schedules(own: Ratios) -> Iterator[tuple[dict[str, Any], Ratios]]:
    """The model's own schedule, then each kind that can reach its mean; with its ratios.

    Yields:
        ``schedule``, ``setting`` (the parameter that was solved for), ``mean_retention`` and ``mod_layers``; ratios.
    """

    def row(name: str, setting: dict[str, float], ratios: Ratios) -> tuple[dict[str, Any], Ratios]:
        found = {"schedule": name, "setting": setting, "mean_retention": mean_retention(ratios)}
        return found | {"mod_layers": sum(ratio is not None for ratio in ratios)}, ratios

    yield row("this model", {}, own)
    target = mean_retention(own)
    for name, schedule in SCHEDULES.items():
        accepted = inspect.signature(schedule).parameters
        parameter = next((each for each in ("shift", "ratio") if each in accepted), None)
        if parameter is None:
            continue
        # The mean never falls as the parameter grows, but jumps where a layer turns dense, so it may be missed.
        low, high = 1e-6, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            reached = mean_retention(schedule(len(own), **{parameter: middle})) >= target
            low, high = (low, middle) if reached else (middle, high)
        ratios = schedule(len(own), **{parameter: high})
        if abs(mean_retention(ratios) - target) < 0.01:
            yield row(name, {parameter: high}, ratios)
