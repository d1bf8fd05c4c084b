"""``pmod convert``: a p-MoD checkpoint of a dense one, and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pmod_cli.cli.app import app, examples
from pmod_cli.cli.options import AsJson, Overrides, RecipeName, Revision
from pmod_cli.extras import starting
from pmod_cli.output.console import emit_json, show_lines, stderr, stdout, tell
from pmod_cli.output.errors import PmodError
from pmod_cli.output.tables import Table
from pmod_cli.output.units import share, si, size

if TYPE_CHECKING:
    from pmod_cli.checkpoints.write import Progress


@app.command(
    "convert",
    epilog=examples(
        "pmod convert llava-hf/llava-1.5-7b-hf ./pmod-llava-1.5-7b --recipe llava-1.5-7b",
        "pmod convert ./my-llava ./my-pmod --set mod.floor=0.1 --dry-run",
        "pmod convert ./my-pmod ./my-llava-again --to baseline",
        "pmod convert ./lora-run ./tuned --merge",
    ),
)
def convert_command(
    source: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.")],
    destination: Annotated[
        Path | None, typer.Argument(help="Folder of the new checkpoint; not needed with --dry-run.")
    ] = None,
    recipe: RecipeName = None,
    settings: Overrides = None,
    to: Annotated[
        Literal["pmod", "baseline"],
        typer.Option(help="baseline takes the routers out of a p-MoD checkpoint again."),
    ] = "pmod",
    merge: Annotated[
        bool,
        typer.Option("--merge", help="SOURCE is a LoRA run: merge its adapter into its base, in memory."),
    ] = False,
    vision_tower: Annotated[
        str | None, typer.Option(help="Folder or hub id, where SOURCE is a language model alone.")
    ] = None,
    projector: Annotated[
        str | None, typer.Option(help="mm_projector.bin, its folder or hub id, for the same case.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or hub id, where SOURCE has no tokenizer.")
    ] = None,
    any_family: Annotated[
        bool,
        typer.Option(
            "--any", help="Try a family that is not listed: proved on a tiny random model, or refused."
        ),
    ] = False,
    revision: Revision = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Load .bin weights (with torch's weights_only reader).")
    ] = False,
    copy: Annotated[bool, typer.Option("--copy", help="Copy weights where links would do.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only say what would be done: layers, expected savings, disk space."),
    ] = False,
    push_to_hub: Annotated[
        str | None, typer.Option(help="user/name to upload the new checkpoint to.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make that repository private if it is new.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the checkpoint at DESTINATION.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a p-MoD checkpoint: link the weights, add routers and one retention ratio per layer."""
    with starting("convert"):
        from pmod_cli.checkpoints import hub
        from pmod_cli.checkpoints.write import check_destination
        from pmod_cli.conversion.convert import convert, convert_back, preview
        from pmod_cli.conversion.formats import Options
        from pmod_cli.conversion.plan import plan_conversion
        from pmod_cli.recipe import load_recipe

    if destination is None and not dry_run:
        raise PmodError("no DESTINATION", "pmod convert SOURCE DESTINATION, or --dry-run")
    if private and push_to_hub is None:
        raise PmodError("--private is of the repository that --push-to-hub names", "leave it out")
    if push_to_hub is not None and not dry_run:
        hub.check_push(push_to_hub)
    if merge:
        given: dict[str, Any] = {
            "--to": to == "baseline",
            "--recipe": recipe,
            "--set": settings,
            "--dry-run": dry_run,
            "--any": any_family,
            "--copy": copy,
        }
        given |= {"--vision-tower": vision_tower, "--projector": projector, "--tokenizer": tokenizer}
        if unused := ", ".join(name for name, value in (given | {"--revision": revision}).items() if value):
            raise PmodError(f"{unused}: nothing that --merge looks at", "convert what it writes")
        assert destination is not None
        with starting("convert --merge"):
            from pmod_cli.training.merge import merge_adapter
        result = merge_adapter(Path(source), destination, force=force, allow_pickle=allow_pickle)
    elif to == "baseline":
        given = {"--recipe": recipe, "--set": settings, "--dry-run": dry_run, "--vision-tower": vision_tower}
        given |= {"--projector": projector, "--tokenizer": tokenizer, "--allow-pickle": allow_pickle}
        given |= {"--any": any_family}
        if unused := ", ".join(name for name, value in given.items() if value):
            raise PmodError(f"{unused}: nothing that --to baseline looks at", "leave them out")
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
            options=Options(allow_pickle, vision_tower, projector, tokenizer, any_family),
            revision=revision,
            headers=dry_run,
        )
        if destination is not None:
            check_destination(destination, plan.source.folder, force, [vision_tower, projector, tokenizer])
        if dry_run:
            planned = preview(plan, destination, copy)
            emit_json("convert", planned) if as_json else _show_preview(planned)
            return
        assert destination is not None
        with _progress() as progress:
            result = convert(plan, destination, force=force, copy=copy, progress=progress)
    pushed = hub.push(destination, push_to_hub, private) if push_to_hub else None
    if as_json:
        emit_json("convert", {**result, "pushed_to": pushed})
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


def _show(result: dict[str, Any], pushed: str | None) -> None:
    routers = f"{result['router_parameters']:,} router parameters"
    if result["to"] == "merged":
        what = f"the merged checkpoint, {routers} in it"
    elif result["mean_retention"] is None:
        what = f"the dense baseline, {routers} taken out"
    else:
        mod = sum(row["kind"] == "mod" for row in result["layers"])
        what = (
            f"{mod} of {len(result['layers'])} layers are MoD, {share(result['mean_retention'])} of vision tokens "
            f"kept on average, {routers} added"
        )
    how = ", ".join(f"{count} {method}" for method, count in result["methods"].items())
    show_lines(
        f"{result['destination']}: {what}",
        f"{size(result['weight_bytes'])} of weights; files: {how}; {result['seconds']:.2f} s",
        *([f"pushed: {pushed}"] if pushed else []),
    )
    _show_notes(result["notes"])


def _show_preview(planned: dict[str, Any]) -> None:
    show_lines(f"{planned['source']}: {planned['format']} format, family {planned['family']}")
    ratios = [row["retention_ratio"] for row in planned["layers"]]
    rows: list[Sequence[str]] = [
        [str(layer), "dense", ""] if ratio is None else [str(layer), "MoD", f"{ratio:.4f}"]
        for layer, ratio in enumerate(ratios)
    ]
    stdout.print(Table("", ["layer", "kind", "retention"], rows, left=2).to_rich())
    lines = [
        f"recipe {planned['recipe'] or 'none: the source brings its own settings'}, "
        f"mean retention {share(planned['mean_retention'])}, {planned['router_parameters']:,} parameters added"
    ]
    if expected := planned["expected"]:
        prompt, flops, cache = (expected[key] for key in ("prompt", "prefill_flops", "kv_bytes"))
        lines += [
            f"at one image of {prompt['width']}x{prompt['height']} pixels ({prompt['vision_tokens']} vision tokens) "
            f"and {prompt['text_tokens']} text tokens:",
            f"  prefill {si(flops['pmod'], 'FLOPs')}, {share(flops['ratio'])} of {si(flops['dense'], 'FLOPs')}",
            f"  KV cache {size(cache['pmod'])}, {share(cache['ratio'])} of {size(cache['dense'])}",
        ]
    if planned["download_bytes"]:
        lines.append(f"download: {size(planned['download_bytes'])}")
    free = size(planned["disk_free_bytes"])
    show_lines(*lines, f"disk: {size(planned['disk_needed_bytes'])} needed, {free} free")
    _show_notes(planned["notes"])


def _show_notes(notes: list[str]) -> None:
    tell(*(f"note: {note}" for note in notes))
