"""The whole of ``pmod visualize``: load, prefill once with the routing recorded, answer, draw."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pmod_cli import plots
from pmod_cli.checkpoints.load import read_config
from pmod_cli.extras import require
from pmod_cli.generation import Prompt, VisionLanguageModel, open_image
from pmod_cli.output.errors import PmodError
from pmod_cli.output.files import check_output, write_file
from pmod_cli.visualize.trace import check_routes, dense_twin, trace

PROGRAM = "pmod visualize"
"""Stands in the metadata of the sheets."""

_SUFFIXES = {"sheet": (".png", ".pdf", ".svg"), "gif": (".gif",), "html": (".html", ".htm")}


def visualize(
    model: str,
    image: Path,
    prompt: str,
    *,
    files: Mapping[str, Path | None],
    force: bool = False,
    layers: str | None = None,
    baseline: str = "auto",
    max_new_tokens: int = 128,
    dtype: str = "auto",
    device: str = "auto",
) -> dict[str, Any]:
    """Draw what each layer of a p-MoD model kept of a picture.

    Args:
        model: p-MoD checkpoint folder or hub id.
        image: The picture's file.
        prompt: The question.
        files: What to write, None for what is not wanted: ``sheet``, ``gif``, ``html``.
        force: Whether files that exist may be replaced.
        layers: Those on the sheet, e.g. ``8,16,24``; six MoD layers by default.
        baseline: ``auto`` (the same weights without routers), ``none``, or a dense checkpoint.
        max_new_tokens: Longest answer.
        dtype: See `VisionLanguageModel.load`.
        device: See `VisionLanguageModel.load`.

    Returns:
        What ``pmod visualize --json`` prints (see ``docs/visualize.md``).

    Raises:
        PmodError: A source or picture that cannot be used, a dense model, a layer that does not exist, a file that
            cannot be written.
        MissingExtraError: matplotlib is needed and not installed.
    """
    wanted = {kind: path for kind, path in files.items() if path}
    if not wanted:
        raise PmodError("nothing to draw", "give -o FILE.png, --gif FILE.gif or --html FILE.html")
    for kind, path in wanted.items():
        check_output(path, "a page" if kind == "html" else "a picture", _SUFFIXES[kind], force)
    if wanted.keys() & {"sheet", "gif"}:
        require("matplotlib")
    try:
        chosen = list(dict.fromkeys(int(part) for part in layers.split(","))) if layers else None
    except ValueError:
        raise PmodError(
            f"--layers {layers}: give layer numbers separated by commas", "e.g. 8,16,24"
        ) from None
    config = read_config(model)
    check_routes(config)
    last = config.text_config.num_hidden_layers - 1
    for layer in chosen or ():
        if not 0 <= layer <= last:
            raise PmodError(f"--layers: there is no layer {layer}", f"the model has 0 to {last}")
    if baseline not in ("auto", "none"):
        read_config(baseline)
    picture = open_image(image)
    loaded = VisionLanguageModel.load(model, dtype=dtype, device=device)
    question = Prompt(prompt, (picture,))
    traced = trace(loaded, question)
    [answer] = loaded.generate([question], max_new_tokens=max_new_tokens)
    dense_answer = None
    if baseline != "none":
        if baseline == "auto":
            name, dense = "the same weights, every layer dense", dense_twin(loaded)
        else:
            name, dense = baseline, VisionLanguageModel.load(baseline, dtype=dtype, device=device)
        [other] = dense.generate([question], max_new_tokens=max_new_tokens)
        dense_answer = {"name": name, "answer": other.text}
    texts: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "answer": answer.text,
        "baseline": dense_answer,
    }
    if "sheet" in wanted:
        from pmod_cli.visualize.draw import default_layers, draw_sheet

        heading = f"“{_cut(prompt, 70)}”  →  “{_cut(answer.text, 40)}”"
        sheet = draw_sheet(traced, picture, chosen or default_layers(traced), heading)
        plots.save(sheet, wanted["sheet"], title=heading, program=PROGRAM, dpi=200)
    if "gif" in wanted:
        from pmod_cli.visualize.draw import draw_animation

        write_file(wanted["gif"], draw_animation(traced, picture))
    if "html" in wanted:
        from pmod_cli.visualize.page import build_page

        write_file(wanted["html"], build_page(traced, picture, **texts))
    return {
        **texts,
        "image": str(image),
        "image_size": list(picture.size),
        "vision_tokens": traced.layout.tokens,
        "views": [
            {"name": view.name, "first": view.first, "rows": view.rows, "columns": view.columns}
            for view in traced.layout.views
        ],
        "layers": [
            {"ratio": ratio, "kept": traced.kept[index].nonzero()[0].tolist()}
            for index, ratio in enumerate(traced.ratios)
        ],
        "files": {name: str(path) for name, path in wanted.items()},
    }


def _cut(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"
