"""``pmod report``: one page from the outputs of one or more runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pmod_cli.cli.app import app, examples
from pmod_cli.cli.options import AsJson, Force
from pmod_cli.extras import starting
from pmod_cli.output.console import emit_json, show_lines, tell


@app.command(
    "report",
    epilog=examples(
        "pmod report pmod-demo -o demo.html",
        "pmod report runs/pmod-llava results/pmod-llava profile.json -o pmod-llava.html",
    ),
)
def report_command(
    places: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...",
            help="Folders that finetune, eval, profile or demo wrote to, or files with a command's --json.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The page; a Markdown file is put beside it.")
    ] = Path("report.html"),
    include_path: Annotated[
        list[Path] | None,
        typer.Option("--include-path", help="Folder of your own tasks, to show their pictures; repeatable."),
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Collect recipe, cost, accuracy, training curves and changed answers of runs into one page."""
    with starting("report"):
        from pmod_cli.report import write_report

    result = write_report(places, output, force=force, include_path=include_path)
    for path, reason in result["unread"].items():
        tell(f"not read: {path}: {reason}")
    if as_json:
        emit_json("report", result)
        return
    show_lines(result["files"]["html"], result["files"]["markdown"])
