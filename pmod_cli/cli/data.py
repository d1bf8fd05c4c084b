"""``pmod data``: what to do with training data before training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pmod_cli.cli.app import app
from pmod_cli.cli.output import emit_json, stderr, stdout

data_app = typer.Typer(no_args_is_help=True, help="Training data: check it, clean it.")
app.add_typer(data_app, name="data")


@data_app.callback()
def _root() -> None:
    pass


@data_app.command("check")
def check_command(
    data: Annotated[Path, typer.Argument(help="LLaVA JSON or JSONL.")],
    images: Annotated[Path, typer.Option("--images", help="Folder that its image names are relative to.")],
    model: Annotated[
        str | None,
        typer.Option("--model", help="Its processor finds samples whose answers all lie past --max-length."),
    ] = None,
    max_length: Annotated[int, typer.Option("--max-length", min=1, help="In tokens.")] = 2048,
    fix: Annotated[Path | None, typer.Option("--fix", help="Write the records that are fit here.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file of --fix.")] = False,
    limit: Annotated[int, typer.Option("--limit", min=0, help="Problems to list.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Find what would go wrong in training. Exit code 1 if anything is, unless --fix writes a clean file.

    Examples:
      pmod data check llava_v1_5_mix665k.json --images data

      pmod data check llava_v1_5_mix665k.json --images data --fix clean.json --model llava-hf/llava-1.5-7b-hf
    """
    from rich.progress import Progress
    from rich.table import Table

    from pmod_cli.errors import GateError
    from pmod_cli.training.check import check_data

    processor = None
    if model is not None:
        from transformers import AutoProcessor

        from pmod_cli.generation import IMAGE_BACKEND, check_source

        check_source(model)
        processor = AutoProcessor.from_pretrained(model, backend=IMAGE_BACKEND)
    with Progress(console=stderr) as bar:
        task = bar.add_task("check", total=None)
        report = check_data(
            data,
            images,
            processor=processor,
            max_length=max_length,
            fix=fix,
            force=force,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
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
