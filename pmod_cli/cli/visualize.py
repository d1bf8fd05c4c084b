"""``pmod visualize``: what each layer kept of a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pmod_cli.cli.app import app, examples
from pmod_cli.extras import starting
from pmod_cli.output.console import emit_json, stdout
from pmod_cli.output.errors import PmodError


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
    prompt: Annotated[str, typer.Option("--prompt", help="What to ask; the chat template is applied.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Sheet of chosen layers, heat map, retention: .png, .pdf or .svg."
        ),
    ] = None,
    gif: Annotated[Path | None, typer.Option("--gif", help="Animation, one frame a layer.")] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Page with a layer slider; needs nothing but itself.")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option("--layers", help="Layers of the sheet, e.g. 8,16,24; six that route by default."),
    ] = None,
    baseline: Annotated[
        str,
        typer.Option(
            "--baseline", help="Dense model for the second answer; auto: the same weights run dense; none."
        ),
    ] = "auto",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")] = 128,
    dtype: Annotated[
        str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16; auto is float32 on a CPU.")
    ] = "auto",
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, ...")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Show which patches of a picture each layer of a p-MoD model processed."""
    files = {name: path for name, path in (("sheet", output), ("gif", gif), ("html", html)) if path}
    if not files:
        raise PmodError("nothing to draw", "give -o FILE.png, --gif FILE.gif or --html FILE.html")
    _check_files(files, force)
    chosen = _parse_layers(layers)

    with starting("visualize"):
        from pmod_cli.visualize.visualize import visualize

    result: dict[str, Any] = visualize(
        model,
        image,
        prompt,
        files=files,
        layers=chosen,
        baseline=baseline,
        max_new_tokens=max_new_tokens,
        dtype=dtype,
        device=device,
    )
    if as_json:
        emit_json("visualize", result)
        return
    stdout.print(f"p-MoD: {result['answer']}", markup=False, soft_wrap=True)
    if result["baseline"]:
        stdout.print(f"dense: {result['baseline']['answer']}", markup=False, soft_wrap=True)
    for path in result["files"].values():
        stdout.print(path, markup=False, soft_wrap=True)


def _check_files(files: dict[str, Path], force: bool) -> None:
    """Whatever is wrong with the places to write to, before a model is loaded."""
    suffixes = {"sheet": (".png", ".pdf", ".svg"), "gif": (".gif",), "html": (".html", ".htm")}
    for name, path in files.items():
        if path.suffix.lower() not in suffixes[name]:
            raise PmodError(f"cannot write {path}", f"name a {' or '.join(suffixes[name])} file")
        if path.is_dir():
            raise PmodError(f"{path} is a folder")
        if path.exists() and not force:
            raise PmodError(f"{path} exists", "--force replaces it")
        if not path.absolute().parent.is_dir():
            raise PmodError(f"no folder {path.parent}")
    if "sheet" in files or "gif" in files:
        from pmod_cli.output.plots import look

        with look():  # is matplotlib there?
            pass


def _parse_layers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise PmodError(f"--layers {text}: give layer numbers separated by commas", "e.g. 8,16,24") from None
