"""The whole of ``pmod profile``: check the options, profile, print, draw, hold against limits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pmod_cli.devices import find_device
from pmod_cli.output.console import emit_json, show_lines, stdout
from pmod_cli.output.errors import GateError, PmodError
from pmod_cli.output.options import refuse_ignored
from pmod_cli.output.progress import working
from pmod_cli.output.reading import is_number, read_json
from pmod_cli.output.tables import Table
from pmod_cli.plots import check_target
from pmod_cli.profiling.options import ProfileOptions
from pmod_cli.profiling.profile import profile
from pmod_cli.profiling.render import notes, profile_table, rows_table
from pmod_cli.profiling.subject import Subject, find_subject

GATES = {
    "max_flops_ratio": ("prefill_flops", "prefill FLOPs"),
    "max_kv_ratio": ("kv_prefill", "KV cache after prefill"),
    "max_prefill_ratio": ("prefill_seconds", "prefill time"),
    "max_first_prefill_ratio": ("first_prefill_seconds", "prefill time at a new prompt length"),
    "max_decode_ratio": ("decode_seconds", "decode time"),
    "max_operators_ratio": ("prefill_operators", "operators of a prefill"),
}
"""Limits that a user can set, and the ratios that they hold for; from the third on they are of what is measured."""


def run(options: ProfileOptions) -> None:
    """Profile, sweep or compare, and print what came of it.

    Raises:
        GateError: A ratio is above its limit.
        PmodError: Options that do not go together, or a model, picture or device that cannot be used.
    """
    if options.compare is not None:
        refuse_ignored(options, "--compare", ("compare", "as_json"))
        comparison = compare_files(*options.compare)
        if options.as_json:
            emit_json("profile", comparison)
            return
        for change in comparison["changes"]:
            ratio = "" if change["ratio"] is None else f" ({change['ratio']:.1%})"
            show_lines(f"{change['key']}: {change['before']} -> {change['after']}{ratio}")
        return
    limits = {name: limit for name in GATES if (limit := getattr(options, name)) is not None}
    _check(options, limits)
    subject = find_subject(
        options.model, recipe=options.recipe, overrides=options.overrides or (), baseline=options.baseline
    )
    if options.sweep or options.schedules:
        _sweep(options, subject)
        return
    with working("profiling") as show:
        result = profile(subject, options, show)
    _print(options, result, profile_table(result), notes(result))
    if options.plot is not None:
        from pmod_cli.profiling.plots import plot_profile

        plot_profile(result, options.plot, force=options.force)
    check_gates(result["ratios"], limits)


def _check(options: ProfileOptions, limits: dict[str, float]) -> None:
    """Refuse what does not go together, before any work."""
    if any(math.isnan(limit) for limit in limits.values()):
        raise PmodError("a --max-... limit is no number: nothing would ever be above it")
    if (limits or options.plot) and (options.sweep or options.schedules):
        hint = "leave --sweep and --schedules out"
        raise PmodError("--plot goes with a single profile, and so do --max-... limits", hint)
    for name in list(GATES)[2:]:
        if name in limits and not options.latency:
            raise PmodError(f"--{name.replace('_', '-')} needs --latency")
    if options.sweep and options.schedules:
        raise PmodError("--sweep and --schedules are two tables", "one at a time")
    if options.plot is not None:
        given = (options.model, options.recipe, options.baseline, options.image)
        check_target(options.plot, options.force, [name for name in given if name])
    if options.latency:
        find_device(options.device)


def check_gates(ratios: Mapping[str, float], limits: Mapping[str, float]) -> None:
    """Hold the ratios of p-MoD to dense against limits, by name as in `GATES`.

    Raises:
        GateError: Names every ratio above its limit.
        PmodError: A limit on something that was not compared or not measured.
    """
    failed = []
    for gate, limit in limits.items():
        key, what = GATES[gate]
        if key not in ratios:
            need = "a p-MoD model and its dense baseline"
            if gate in list(GATES)[2:]:
                need = "--latency" if gate != "max_decode_ratio" else "--latency and --new-tokens above 1"
            raise PmodError(f"--{gate.replace('_', '-')} needs {need}")
        if ratios[key] > limit:
            failed.append(f"{what}: {ratios[key]:.4f} of dense, above {limit:g}")
    if failed:
        raise GateError("; ".join(failed))


def _sweep(options: ProfileOptions, subject: Subject) -> None:
    from pmod_cli.profiling.sweep import sweep

    with working("profiling") as show:
        rows = sweep(subject, options, options.sweep or "schedules", show)
    what = f"sweep of {options.sweep}" if options.sweep else "schedules at equal mean retention"
    result = {"model": subject.name, "sweep": options.sweep or "schedules", "rows": rows}
    _print(options, result, rows_table(f"{subject.name}: {what}, p-MoD / dense", rows))


def _print(options: ProfileOptions, result: dict[str, Any], table: Table, lines: Sequence[str] = ()) -> None:
    lines = [f"- {line}" for line in lines]
    if options.as_json:
        emit_json("profile", result)
    elif options.markdown:
        show_lines(table.to_markdown(), *([""] if lines else []), *lines)
    else:
        stdout.print(table.to_rich())
        show_lines(*lines)


def compare_files(before: Path, after: Path) -> dict[str, Any]:
    """Compare the output of two ``pmod profile --json`` runs.

    Returns:
        ``before`` and ``after`` (the files) and ``changes``: for each figure that differs ``key``, ``before``,
        ``after`` and, for numbers, ``ratio``.

    Raises:
        PmodError: A file that is not such output.
    """
    figures = []
    for path in (before, after):
        document = read_json(path)
        result = document.get("result")
        if not isinstance(result, dict) or document.get("command") != "profile":
            raise PmodError(f"{path} is not the output of pmod profile --json")
        figures.append(dict(_flatten("", result)))
    changes = []
    for key in figures[0] | figures[1]:
        old, new = (side.get(key) for side in figures)
        numbers = {type(old), type(new)} <= {int, float} and is_number(old) and is_number(new)
        if old != new:
            ratio = new / old if numbers and old else None
            changes.append({"key": key, "before": old, "after": new, "ratio": ratio})
    return {"before": str(before), "after": str(after), "changes": changes}


def _flatten(prefix: str, value: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _flatten(f"{prefix}{key}.", inner)
        else:
            # A list is compared as one figure, layers as their number; which layer changed shows in the sums.
            layers = isinstance(inner, list) and inner and isinstance(inner[0], dict)
            yield f"{prefix}{key}", len(inner) if layers else inner
