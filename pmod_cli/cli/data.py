"""``pmod data``: what to do with training data before training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pmod_cli.cli.app import app, examples
from pmod_cli.extras import starting
from pmod_cli.output.console import emit_json, stderr, stdout

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
    images: Annotated[
        Path | None, typer.Option("--images", help="Folder that a file's image names are relative to.")
    ] = None,
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
        typer.Option("--fix", help="Write the records that are fit here: a file, or a table's folder."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file of --fix.")] = False,
    limit: Annotated[int, typer.Option("--limit", min=0, help="Problems to list.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    r"""Find what would go wrong in training. Exit code 1 if anything is, unless --fix writes a clean file."""
    from rich.progress import Progress
    from rich.table import Table

    with starting("data check"):
        from pmod_cli.data.check import check_data
    from pmod_cli.output.errors import GateError
    from pmod_cli.recipe import default_recipe, load_recipe

    settings = (load_recipe(recipe) if recipe else default_recipe()).train
    processor = None
    if model is not None:
        with starting("data check"):
            from pmod_cli.training.loading import load_processor

        processor = load_processor(model, settings)
    bar = Progress(console=stderr)
    task = bar.add_task("check", total=None)

    def show(done: int, total: int) -> None:
        bar.start()  # not before the first record: until then an error is one line and no more
        bar.update(task, completed=done, total=total)

    try:
        report = check_data(
            data,
            images,
            processor=processor,
            max_length=max_length if max_length is not None else settings.max_length,
            fix=fix,
            force=force,
            progress=show,
        )
    finally:
        if bar.live.is_started:
            bar.stop()
    if as_json:
        emit_json("data check", report.to_dict())
    else:
        for problem in report.problems[:limit]:
            stdout.print(
                f"record {problem.index} (id {problem.id or '-'}): {problem.detail}",
                markup=False,
                soft_wrap=True,
            )
        table = Table("problem", "records", title=f"{report.good} of {report.records} records are fit")
        for kind, count in report.counts.items():
            table.add_row(kind, str(count))
        stdout.print(table)
        if report.fixed:
            stdout.print(f"clean file: {report.fixed}", markup=False, soft_wrap=True)
    if report.problems and fix is None:
        raise GateError(f"{len(report.problems)} of {report.records} records are not fit for training")
