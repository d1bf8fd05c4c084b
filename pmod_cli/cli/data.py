"""``pmod data``: what to do with training data before training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pmod_cli.cli.app import app, examples
from pmod_cli.cli.options import AsJson, Images
from pmod_cli.extras import starting
from pmod_cli.output.console import emit_json, show_lines, stdout
from pmod_cli.output.errors import GateError
from pmod_cli.output.progress import late_progress
from pmod_cli.output.tables import Table

data_app = typer.Typer(no_args_is_help=True, help="Training data: check it, clean it.")
app.add_typer(data_app, name="data")


@data_app.callback()
def _root() -> None:
    pass


@data_app.command(
    "check",
    epilog=examples(
        "pmod data check llava_v1_5_mix665k.json --images data",
        "pmod data check llava_v1_5_mix665k.json --images data --fix clean.json --model ./pmod-llava-1.5-7b",
    ),
)
def check_command(
    data: Annotated[str, typer.Argument(help="LLaVA JSON or JSONL; or a datasets folder or hub id.")],
    images: Images = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Its processor finds samples whose answers all lie past --max-length."),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", help="With --model: its chat template, picture shape and maximum length."),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option("--max-length", min=1, help="In tokens; the recipe's, or 2048.")
    ] = None,
    fix: Annotated[
        Path | None,
        typer.Option("--fix", help="Write the usable records here: a file, or a table's folder."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file of --fix.")] = False,
    limit: Annotated[int, typer.Option("--limit", min=0, help="Unfit records to list.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Find what would go wrong in training. Exit 1 if any record is unfit, unless --fix writes a clean file."""
    from pmod_cli.recipe import default_recipe, load_recipe

    settings = (load_recipe(recipe) if recipe else default_recipe()).train
    with starting("data check"):
        from pmod_cli.data.check import check_data

        if model is not None:
            from pmod_cli.training.model import load_processor
    processor = load_processor(model, settings) if model is not None else None
    with late_progress() as show:
        report = check_data(
            data,
            images,
            processor=processor,
            max_length=max_length if max_length is not None else settings.max_length,
            image_position=settings.image_position,
            fix=fix,
            force=force,
            progress=lambda done, total: show("check", done, total),
        )
    problems = report["problems"]
    if as_json:
        emit_json("data check", report)
    else:
        for problem in problems[:limit]:
            show_lines(f"record {problem['index']} (id {problem['id'] or '-'}): {problem['detail']}")
        rows = [[kind, str(count)] for kind, count in report["counts"].items()]
        if rows:
            stdout.print(Table("", ("problem", "records"), rows).to_rich())
        show_lines(f"{report['good']} of {report['records']} records are fit")
        show_lines(*(f"note: {note}: {count}" for note, count in report["notes"].items()))
        if report["fixed"]:
            show_lines(f"clean file: {report['fixed']}")
    if problems and fix is None:
        raise GateError(f"{len(problems)} of {report['records']} records are not fit for training")
