"""The whole of ``pmod profile``: check the options, profile, print, draw, hold against limits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pmod_cli.output.console import emit_json, stderr, stdout
from pmod_cli.output.errors import PmodError
from pmod_cli.output.tables import Table
from pmod_cli.profiling.explain import notes
from pmod_cli.profiling.options import ProfileOptions
from pmod_cli.profiling.profile import Settings, profile
from pmod_cli.profiling.prompt import parse_size
from pmod_cli.profiling.render import changes_table, profile_markdown, profile_tables, rows_table
from pmod_cli.profiling.result import GATES, check_gates
from pmod_cli.profiling.subject import Subject, find_subject


def run(options: ProfileOptions) -> None:
    """Profile, sweep or compare, and print what came of it.

    Raises:
        GateError: A ratio is above its limit.
        PmodError: Options that do not go together, or a model, picture or device that cannot be used.
    """
    if options.compare is not None:
        _compare(options, *options.compare)
        return
    _check(options)
    device, dtype = options.device, "bfloat16"
    if options.latency:
        from pmod_cli.devices import find_device

        device = str(find_device(device))
        dtype = "float32" if device == "cpu" else dtype
    settings = _settings(options, dtype)
    subject = find_subject(
        options.model, recipe=options.recipe, overrides=options.overrides or (), baseline=options.baseline
    )
    measure_options = {"device": device, "repeats": options.repeats} if options.latency else None
    if options.sweep or options.schedules:
        _sweep(options, subject, settings, measure_options)
    else:
        _profile(options, subject, settings, measure_options)


def _limits(options: ProfileOptions) -> dict[str, float]:
    """The limits that are set, by name as in `GATES`."""
    return {name: limit for name in GATES if (limit := getattr(options, name)) is not None}


def _check(options: ProfileOptions) -> None:
    """Refuse what does not go together, before any work."""
    tables = bool(options.sweep) + options.schedules
    limits = _limits(options)
    if any(math.isnan(limit) for limit in limits.values()):
        raise PmodError("a --max-... limit is no number: nothing would ever be above it")
    if limits and tables:
        raise PmodError("--max-... limits hold for a single profile", "leave --sweep and --schedules out")
    if options.max_prefill_ratio is not None and not options.latency:
        raise PmodError("--max-prefill-ratio needs --latency")
    if options.plot is not None and options.schedules:
        raise PmodError("--plot goes with a profile or with --sweep")
    if tables > 1:
        raise PmodError("--sweep and --schedules are two tables", "one at a time")
    if options.plot is not None:
        from pmod_cli.plots import check_target

        check_target(options.plot, options.force)


def _settings(options: ProfileOptions, default_dtype: str) -> Settings:
    size = parse_size(options.image_size) if options.image_size else None
    if size is None and options.image is not None:
        size = _picture_size(options.image)
    return Settings(
        image_size=size,
        with_image=not options.no_image,
        text_tokens=options.text_tokens,
        new_tokens=options.new_tokens,
        batch=options.batch,
        dtype=default_dtype if options.dtype == "auto" else options.dtype,
        all_logits=options.logits == "all",
        convention=options.convention,
        counter=options.counter,
    )


def _picture_size(path: Path) -> tuple[int, int]:
    """(height, width) of a picture."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            return picture.height, picture.width
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise PmodError(f"cannot read the picture {path}: {error}") from error


def _profile(options: ProfileOptions, subject: Subject, settings: Settings, measure_options: Any) -> None:
    with stderr.status("profiling") as status:
        result = profile(subject, settings, measure_options, status.update)
    if options.as_json:
        emit_json("profile", result.to_dict())
    elif options.markdown:
        stdout.print(profile_markdown(result, options.layers), markup=False, soft_wrap=True, end="")
    else:
        for table in profile_tables(result, options.layers):
            stdout.print(table.to_rich())
        for note in notes(result):
            stdout.print(f"- {note}", markup=False)
    if options.plot is not None:
        from pmod_cli.profiling.plots import plot_profile

        plot_profile(result, options.plot)
    check_gates(result, _limits(options))


def _sweep(options: ProfileOptions, subject: Subject, settings: Settings, measure_options: Any) -> None:
    """A sweep, or the schedules."""
    from pmod_cli.profiling.sweep import compare_schedules, sweep

    with stderr.status("profiling") as status:
        if options.sweep:
            rows = sweep(subject, settings, options.sweep, measure_options, status.update)
        else:
            rows = compare_schedules(subject, settings, measure_options, status.update)
    result = {"model": subject.name, "sweep": options.sweep or "schedules", "rows": rows}
    what = f"sweep of {options.sweep}" if options.sweep else "schedules at equal mean retention"
    _print(options, result, rows_table(f"{subject.name}: {what}, p-MoD / dense", rows))
    if options.plot is not None and options.sweep:
        from pmod_cli.profiling.plots import plot_sweep

        plot_sweep(rows, options.sweep, options.plot, title=subject.name)


def _compare(options: ProfileOptions, before: Path, after: Path) -> None:
    from pmod_cli.profiling.compare import compare_files

    result = compare_files(before, after)
    _print(options, result, changes_table(result))


def _print(options: ProfileOptions, result: dict[str, Any], table: Table) -> None:
    if options.as_json:
        emit_json("profile", result)
    elif options.markdown:
        stdout.print(table.to_markdown(), markup=False, soft_wrap=True)
    else:
        stdout.print(table.to_rich())
