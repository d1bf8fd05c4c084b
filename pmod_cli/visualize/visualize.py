"""The whole of ``pmod visualize``: load, prefill once with the routing recorded, answer, draw."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from pmod_cli import plots
from pmod_cli.checkpoints.load import read_config
from pmod_cli.extras import require
from pmod_cli.generation import VisionLanguageModel
from pmod_cli.output.errors import PmodError
from pmod_cli.output.files import check_output, replacing_all
from pmod_cli.output.marks import TAG
from pmod_cli.output.paths import public_name
from pmod_cli.pictures import open_image
from pmod_cli.prompts import Prompt
from pmod_cli.visualize.options import VisualizeOptions
from pmod_cli.visualize.trace import check_routes, dense_twin, trace

PROGRAM = "pmod visualize"
"""Stands in the metadata of the sheets."""

_SUFFIXES = {"sheet": (".png", ".pdf", ".svg"), "gif": (".gif",), "html": (".html", ".htm")}


def visualize(options: VisualizeOptions) -> dict[str, Any]:
    """Draw what each layer of a p-MoD model kept of a picture.

    Returns:
        What ``pmod visualize --json`` prints (see ``docs/json.md``).

    Raises:
        PmodError: A source or picture that cannot be used, a dense model, a layer that does not exist, a file that
            cannot be written.
        MissingExtraError: matplotlib is needed and not installed.
    """
    files, chosen = _check(options)
    picture = open_image(options.image)
    load = partial(VisionLanguageModel.load, dtype=options.dtype, device=options.device)
    loaded = load(options.model)
    question = Prompt(options.prompt, (picture,))
    loaded.check_context(loaded.length(question))
    traced = trace(loaded, question)
    [answer] = loaded.generate([question], max_new_tokens=options.max_new_tokens)
    dense_answer = None
    if options.baseline != "none":
        if options.baseline == "auto":
            name, dense = "the same weights, every layer dense", dense_twin(loaded)
        else:
            name, dense = options.baseline, load(options.baseline)
        [other] = dense.generate([question], max_new_tokens=options.max_new_tokens)
        dense_answer = {"name": name, "answer": other.text}
    texts: dict[str, Any] = {
        "model": options.model,
        "prompt": options.prompt,
        "answer": answer.text,
        "baseline": dense_answer,
    }
    made: dict[str, bytes] = {}
    if "sheet" in files:
        from pmod_cli.visualize.draw import default_layers, draw_sheet

        heading = f"“{_cut(options.prompt, 70)}”  →  “{_cut(answer.text, 40)}”"
        sheet = draw_sheet(traced, picture, chosen or default_layers(traced), heading)
        made["sheet"] = plots.render(sheet, files["sheet"].suffix, title=heading, program=PROGRAM, dpi=200)
    if "gif" in files:
        from pmod_cli.visualize.draw import draw_animation

        made["gif"] = draw_animation(traced, picture)
    if "html" in files:
        from pmod_cli.visualize.page import build_page

        shown = texts | {"model": public_name(options.model)}
        if dense_answer:
            shown["baseline"] = dense_answer | {"name": public_name(dense_answer["name"])}
        page = build_page(traced, picture, **shown)
        made["html"] = f"{page}\n<!-- {TAG} -->\n".encode()
    with replacing_all(list(files.values()), force=options.force) as places:
        for kind, place in zip(files, places, strict=True):
            place.write_bytes(made[kind])
    return {
        **texts,
        "image": str(options.image),
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
        "files": {name: str(path) for name, path in files.items()},
    }


def _check(options: VisualizeOptions) -> tuple[dict[str, Path], list[int]]:
    """What to write, and the layers that are named; checked before a model is loaded."""
    wanted = {"sheet": options.output, "gif": options.gif, "html": options.html}
    files = {kind: path for kind, path in wanted.items() if path}
    if not files:
        raise PmodError("nothing to draw", "give -o FILE.png, --gif FILE.gif or --html FILE.html")
    inputs = (options.image, options.model, options.baseline)
    for kind, path in files.items():
        what = "a page" if kind == "html" else "a picture"
        check_output(path, what, _SUFFIXES[kind], options.force, inputs)
    if files.keys() & {"sheet", "gif"}:
        require("matplotlib")
    try:
        layers = list(dict.fromkeys(int(part) for part in (options.layers or "").split(",") if part))
    except ValueError:
        raise PmodError(
            f"--layers {options.layers}: give layer numbers separated by commas", "e.g. 8,16,24"
        ) from None
    config = read_config(options.model)
    check_routes(config)
    last = config.text_config.num_hidden_layers - 1
    for layer in layers:
        if not 0 <= layer <= last:
            raise PmodError(f"--layers: there is no layer {layer}", f"the model has 0 to {last}")
    if options.baseline not in ("auto", "none") and hasattr(read_config(options.baseline), "mod_config"):
        raise PmodError(f"--baseline {options.baseline} is p-MoD itself", "give a dense model, auto or none")
    return files, layers


def _cut(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"
