"""``pmod convert``: a p-MoD checkpoint of a dense one, and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pmod_cli.cli.app import app, examples
from pmod_cli.extras import starting
from pmod_cli.output.console import emit_json, stderr, stdout
from pmod_cli.output.errors import PmodError

if TYPE_CHECKING:
    from pmod_cli.checkpoints.write import Progress
    from pmod_cli.conversion.convert import ConvertResult
    from pmod_cli.conversion.preview import Preview


class Target(str, Enum):
    """What to make."""

    pmod = "pmod"
    baseline = "baseline"


@app.command(
    "convert",
    epilog=examples(
        "pmod convert llava-hf/llava-1.5-7b-hf ./pmod-llava-1.5-7b --recipe llava-1.5-7b",
        "pmod convert ./my-llava ./my-pmod --set mod.floor=0.1 --dry-run",
        "pmod convert ./my-pmod ./my-llava-again --to baseline",
    ),
)
def convert_command(
    source: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.")],
    destination: Annotated[
        Path | None, typer.Argument(help="Folder of the new checkpoint; not needed with --dry-run.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe", help="Name of a shipped recipe, or a .yaml file (default: the paper's settings)."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key=value over the recipe, e.g. mod.floor=0.1.")
    ] = None,
    to: Annotated[
        Target, typer.Option("--to", help="baseline takes the routers out of a p-MoD checkpoint again.")
    ] = Target.pmod,
    source_format: Annotated[
        str | None, typer.Option("--format", help="Format of SOURCE; detected by default.")
    ] = None,
    vision_tower: Annotated[
        str | None, typer.Option("--vision-tower", help="Where SOURCE is a language model alone.")
    ] = None,
    projector: Annotated[
        str | None, typer.Option("--projector", help="Likewise: mm_projector.bin, its folder or hub id.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Folder or hub id, where SOURCE has no tokenizer.")
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Hub branch, tag or commit.")] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Load .bin weights (by torch's weights_only reader).")
    ] = False,
    copy: Annotated[bool, typer.Option("--copy", help="Copy weights where links would do.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only say what would be done: layers, expected savings, disk space."),
    ] = False,
    push_to_hub: Annotated[
        str | None, typer.Option("--push-to-hub", help="user/name to upload the new checkpoint to.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make that repository private if it is new.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the checkpoint at DESTINATION.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Make a p-MoD checkpoint: weights are linked, routers and a retention ratio a layer are added."""
    with starting("convert"):
        from pmod_cli.checkpoints import hub
        from pmod_cli.checkpoints.write import check_destination
        from pmod_cli.conversion.convert import convert, convert_back, plan_conversion
        from pmod_cli.conversion.formats import Options
        from pmod_cli.recipe import load_recipe

    if destination is None and not dry_run:
        raise PmodError("no DESTINATION", "pmod convert SOURCE DESTINATION, or --dry-run")
    if push_to_hub and not dry_run:
        hub.check_login()
    if to is Target.baseline:
        if recipe or settings or source_format or dry_run:
            raise PmodError(
                "--recipe, --set, --format and --dry-run say nothing about --to baseline", "leave them out"
            )
        assert destination is not None
        with _progress() as progress:
            result = convert_back(
                source, destination, revision=revision, force=force, copy=copy, progress=progress
            )
    else:
        chosen = load_recipe(recipe, settings or ()) if recipe else None
        plan = plan_conversion(
            source,
            recipe=chosen,
            overrides=settings or (),
            fmt=source_format,
            options=Options(
                allow_pickle=allow_pickle,
                vision_tower=vision_tower,
                projector=projector,
                tokenizer=tokenizer,
                parts=chosen.source if chosen and isinstance(chosen.source, dict) else {},
                family=chosen.family if chosen else None,
            ),
            revision=revision,
            headers=dry_run,
        )
        if dry_run:
            from pmod_cli.conversion.preview import preview

            if destination is not None:
                check_destination(destination, plan.source.folder, force)
            told = preview(plan, destination, copy)
            emit_json("convert", told.to_dict()) if as_json else _show_preview(told)
            return
        assert destination is not None
        with _progress() as progress:
            result = convert(plan, destination, force=force, copy=copy, progress=progress)
    pushed = hub.push(destination, push_to_hub, private) if push_to_hub else None
    if as_json:
        emit_json("convert", {**result.to_dict(), "pushed_to": pushed})
    else:
        _show(result, pushed)


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on a terminal's stderr, which goes when it is done."""
    from rich.progress import DownloadColumn, Progress, SpinnerColumn, TextColumn, TransferSpeedColumn

    columns = (SpinnerColumn(), TextColumn("weights"), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task("weights", total=None)
        yield lambda count: bar.advance(task, count)


def _show(result: ConvertResult, pushed: str | None) -> None:
    how = ", ".join(f"{count} {method}" for method, count in result.methods.items())
    routers = f"{result.router_parameters:,} router parameters"
    if result.mean_retention is None:
        what = f"the dense baseline, {routers} taken out"
    else:
        mod = sum(row["kind"] == "mod" for row in result.layers)
        what = (
            f"{mod} of {len(result.layers)} layers are MoD, {100 * result.mean_retention:.1f} % of vision tokens "
            f"kept on average, {routers} added"
        )
    lines = [
        f"{result.destination}: {what}",
        f"{_si(result.weight_bytes)}B of weights; files: {how}; {result.seconds:.2f} s",
    ]
    if pushed:
        lines.append(f"pushed: {pushed}")
    for line in lines:
        stdout.print(line, markup=False, soft_wrap=True)
    _show_notes(result.notes)


def _show_preview(told: Preview) -> None:
    from rich.table import Table

    stdout.print(f"{told.source}: {told.format} format, family {told.family}", markup=False, soft_wrap=True)
    table = Table("layer", "kind", "retention")
    table.columns[2].justify = "right"
    for row in told.layers:
        ratio = row["retention_ratio"]
        table.add_row(str(row["layer"]), *(("dense", "") if ratio is None else ("MoD", f"{ratio:.4f}")))
    stdout.print(table)
    lines = [
        f"recipe {told.recipe or 'none: the source brings its own settings'}, "
        f"mean retention {100 * told.mean_retention:.2f} %, {told.router_parameters:,} parameters added",
    ]
    if told.expected:
        lines += _expected_lines(told.expected)
    if told.download_bytes:
        lines.append(f"download: {_si(told.download_bytes)}B")
    lines.append(f"disk: {_si(told.disk_needed_bytes)}B needed, {_si(told.disk_free_bytes)}B free")
    for line in lines:
        stdout.print(line, markup=False, soft_wrap=True)
    _show_notes(told.notes)


def _expected_lines(expected: dict[str, Any]) -> list[str]:
    prompt, flops, cache = (expected[key] for key in ("prompt", "prefill_flops", "kv_bytes"))
    return [
        f"at one image of {prompt['width']}x{prompt['height']} pixels ({prompt['vision_tokens']} vision tokens) and "
        f"{prompt['text_tokens']} text tokens:",
        f"  prefill {_si(flops['pmod'])}FLOPs, {100 * flops['ratio']:.1f} % of {_si(flops['dense'])}FLOPs",
        f"  KV cache {_si(cache['pmod'])}B, {100 * cache['ratio']:.1f} % of {_si(cache['dense'])}B",
    ]


def _show_notes(notes: list[str]) -> None:
    for note in notes:
        stderr.print(f"note: {note}", markup=False, soft_wrap=True)


def _si(value: float) -> str:
    """A number with its prefix: ``3.82 T``."""
    power = 0
    while value >= 1000 and power < 4:
        value, power = value / 1000, power + 1
    return f"{value:.4g} {['', 'k', 'M', 'G', 'T'][power]}"
