"""``pmod visualize``: what each layer kept of a picture."""

from __future__ import annotations

import typer

from pmod_cli.cli.app import app, examples
from pmod_cli.cli.options import AsJson, Device, Dtype, Force, MaxNewTokens, Prompt, options_of
from pmod_cli.extras import starting
from pmod_cli.output.console import emit_json, show_lines
from pmod_cli.visualize.options import VisualizeOptions


@app.command(
    "visualize",
    epilog=examples(
        'pmod visualize ./pmod-llava-1.5-7b --image cat.jpg --prompt "What is on the sofa?" -o cat.png',
        'pmod visualize ./pmod-llava-1.5-7b --image cat.jpg --prompt "What is it?" --html cat.html --gif cat.gif',
    ),
)
@options_of(
    VisualizeOptions,
    model=typer.Argument(help="p-MoD checkpoint folder or hub id."),
    image="A picture.",
    prompt=Prompt,
    output=typer.Option(
        "--output", "-o", help="Sheet of chosen layers, heat map, retention: .png, .pdf or .svg."
    ),
    gif="Animation, one frame per layer.",
    html="Page with a layer slider, in one file.",
    layers="Layers of the sheet, e.g. 8,16,24; default: six MoD layers.",
    baseline="Dense model for the second answer; auto: the same weights run dense; none.",
    max_new_tokens=MaxNewTokens,
    dtype=Dtype,
    device=Device,
    force=Force,
    as_json=AsJson,
)
def visualize_command(options: VisualizeOptions) -> None:
    """Show which patches of a picture each layer of a p-MoD model processed."""
    with starting("visualize"):
        from pmod_cli.visualize.visualize import visualize
    result = visualize(options)
    if options.as_json:
        emit_json("visualize", result)
        return
    answers = {"p-MoD": result["answer"], "dense": (result["baseline"] or {}).get("answer")}
    show_lines(*(f"{name}: {answer}" for name, answer in answers.items() if answer is not None))
    show_lines(*result["files"].values())
