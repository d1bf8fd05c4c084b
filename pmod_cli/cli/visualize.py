"""``pmod visualize``: what each layer kept of a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pmod_cli.cli.app import app, examples
from pmod_cli.cli.options import AsJson, Device, Dtype, Force, MaxNewTokens, Prompt
from pmod_cli.extras import starting
from pmod_cli.output.console import emit_json, show_lines


@app.command(
    "visualize",
    epilog=examples(
        'pmod visualize ./pmod-llava-1.5-7b --image cat.jpg --prompt "What is on the sofa?" -o cat.png',
        'pmod visualize ./pmod-llava-1.5-7b --image cat.jpg --prompt "What is it?" --html cat.html --gif cat.gif',
    ),
)
def visualize_command(
    model: Annotated[str, typer.Argument(help="p-MoD checkpoint folder or hub id.")],
    image: Annotated[Path, typer.Option("--image", help="A picture.")],
    prompt: Prompt,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Sheet of chosen layers, heat map, retention: .png, .pdf or .svg."
        ),
    ] = None,
    gif: Annotated[Path | None, typer.Option("--gif", help="Animation, one frame per layer.")] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Page with a layer slider, in one file.")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option("--layers", help="Layers of the sheet, e.g. 8,16,24; default: six MoD layers."),
    ] = None,
    baseline: Annotated[
        str,
        typer.Option(
            "--baseline", help="Dense model for the second answer; auto: the same weights run dense; none."
        ),
    ] = "auto",
    max_new_tokens: MaxNewTokens = 128,
    dtype: Dtype = "auto",
    device: Device = "auto",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Show which patches of a picture each layer of a p-MoD model processed."""
    with starting("visualize"):
        from pmod_cli.visualize.visualize import visualize
    result = visualize(
        model,
        image,
        prompt,
        files={"sheet": output, "gif": gif, "html": html},
        force=force,
        layers=layers,
        baseline=baseline,
        max_new_tokens=max_new_tokens,
        dtype=dtype,
        device=device,
    )
    if as_json:
        emit_json("visualize", result)
        return
    answers = {"p-MoD": result["answer"], "dense": (result["baseline"] or {}).get("answer")}
    show_lines(*(f"{name}: {answer}" for name, answer in answers.items() if answer is not None))
    show_lines(*result["files"].values())
