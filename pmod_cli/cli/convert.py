"""``pmod convert``: a p-MoD checkpoint of a dense one, and back."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pmod_cli.cli.app import app
from pmod_cli.cli.output import emit_json, stderr, stdout
from pmod_cli.errors import PmodError

if TYPE_CHECKING:
    from pmod_cli.conversion.convert import ConvertResult


class Target(str, Enum):
    """What to make."""

    pmod = "pmod"
    baseline = "baseline"


@app.command("convert")
def convert_command(
    source: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.")],
    destination: Annotated[Path, typer.Argument(help="Folder of the new checkpoint.")],
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
    force: Annotated[bool, typer.Option("--force", help="Replace the checkpoint at DESTINATION.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Make a p-MoD checkpoint: weights are linked, routers and a retention ratio a layer are added.

    Examples:
      pmod convert llava-hf/llava-1.5-7b-hf ./pmod-llava-1.5-7b --recipe llava-1.5-7b

      pmod convert ./my-llava ./my-pmod --set mod.floor=0.1 --dry-run

      pmod convert ./my-pmod ./my-llava-again --to baseline
    """
    from pmod_cli.conversion.convert import convert, convert_back, plan_conversion
    from pmod_cli.conversion.formats import Options
    from pmod_cli.recipe import load_recipe

    if to is Target.baseline:
        if recipe or settings or source_format:
            raise PmodError("--recipe, --set and --format say nothing about --to baseline", "leave them out")
        result = convert_back(source, destination, revision=revision, force=force, copy=copy)
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
        )
        result = convert(plan, destination, force=force, copy=copy)
    if as_json:
        emit_json("convert", result.to_dict())
    else:
        _show(result)


def _show(result: ConvertResult) -> None:
    how = ", ".join(f"{count} by {method}" for method, count in result.methods.items())
    line = f"{result.destination}: {result.weight_bytes / 1e9:.2f} GB of weights ({how}) in {result.seconds:.1f} s"
    stdout.print(line, markup=False, soft_wrap=True)
    for note in result.notes:
        stderr.print(f"note: {note}", markup=False, soft_wrap=True)
