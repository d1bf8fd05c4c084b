"""The whole of ``pmod visualize``: load, prefill once with the routing recorded, answer, draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image

from pmod_cli import plots
from pmod_cli.checkpoints.load import read_config
from pmod_cli.extras import require
from pmod_cli.generation import Prompt, VisionLanguageModel, open_image
from pmod_cli.output.errors import PmodError
from pmod_cli.output.files import write_file
from pmod_cli.visualize.trace import Trace, check_routes, dense_twin, trace

PROGRAM = "pmod visualize"
"""Stands in the metadata of the sheets."""

_SUFFIXES = {"sheet": (".png", ".pdf", ".svg"), "gif": (".gif",), "html": (".html", ".htm")}


def visualize(
    model: str,
    image: Path,
    prompt: str,
    *,
    files: Mapping[str, Path],
    layers: Sequence[int] | None = None,
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
        files: What to write: ``sheet``, ``gif``, ``html``.
        layers: Those on the sheet; six MoD layers by default.
        baseline: ``auto`` (the same weights without routers), ``none``, or a dense checkpoint.
        max_new_tokens: Longest answer.
        dtype: See `VisionLanguageModel.load`.
        device: See `VisionLanguageModel.load`.

    Returns:
        What ``pmod visualize --json`` prints (see ``docs/json.md``).

    Raises:
        PmodError: A source or picture that cannot be used, a dense model, a layer that does not exist.
    """
    config = read_config(model)
    check_routes(config)
    last = config.text_config.num_hidden_layers - 1
    for layer in layers or ():
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
        name, dense = _dense_model(loaded, baseline, dtype, device)
        [other] = dense.generate([question], max_new_tokens=max_new_tokens)
        dense_answer = {"name": name, "answer": other.text}
    texts = {"model": model, "prompt": prompt, "answer": answer.text, "baseline": dense_answer}
    _draw(traced, picture, files, layers, texts)
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
        "files": {name: str(path) for name, path in files.items()},
    }


def check_files(wanted: Mapping[str, Path | None], force: bool) -> dict[str, Path]:
    """Refuse files that cannot be written, before a model is loaded.

    Args:
        wanted: By ``sheet``, ``gif`` and ``html``; None for those that are not wanted.
        force: Whether files that exist may be replaced.

    Returns:
        Those that are wanted.

    Raises:
        MissingExtraError: matplotlib is needed and not installed.
        PmodError: None is wanted, or one cannot be written.
    """
    files = {name: path for name, path in wanted.items() if path}
    if not files:
        raise PmodError("nothing to draw", "give -o FILE.png, --gif FILE.gif or --html FILE.html")
    for name, path in files.items():
        if path.suffix.lower() not in _SUFFIXES[name]:
            raise PmodError(f"cannot write {path}", f"name a {' or '.join(_SUFFIXES[name])} file")
        if path.is_dir():
            raise PmodError(f"{path} is a folder")
        if path.exists() and not force:
            raise PmodError(f"{path} exists", "--force replaces it")
        if not path.absolute().parent.is_dir():
            raise PmodError(f"no folder {path.parent}")
    if files.keys() & {"sheet", "gif"}:
        require("matplotlib")
    return files


def parse_layers(text: str | None) -> list[int] | None:
    """The layer numbers of ``8,16,24``, each once; None for the default.

    Raises:
        PmodError: Something else than numbers.
    """
    if text is None:
        return None
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise PmodError(f"--layers {text}: give layer numbers separated by commas", "e.g. 8,16,24") from None


def _dense_model(
    loaded: VisionLanguageModel, baseline: str, dtype: str, device: str
) -> tuple[str, VisionLanguageModel]:
    """The baseline's name, and the baseline."""
    if baseline == "auto":
        return "the same weights, every layer dense", dense_twin(loaded)
    return baseline, VisionLanguageModel.load(baseline, dtype=dtype, device=device)


def _draw(
    traced: Trace,
    picture: Image,
    files: Mapping[str, Path],
    layers: Sequence[int] | None,
    texts: dict[str, Any],
) -> None:
    """Write the files; ``texts`` are ``model``, ``prompt``, ``answer`` and ``baseline`` of the result."""
    if "sheet" in files:
        from pmod_cli.visualize.draw import default_layers, draw_sheet

        heading = f"“{_cut(texts['prompt'], 70)}”  →  “{_cut(texts['answer'], 40)}”"
        sheet = draw_sheet(traced, picture, default_layers(traced) if layers is None else layers, heading)
        plots.save(sheet, files["sheet"], title=heading, program=PROGRAM, dpi=200)
    if "gif" in files:
        from pmod_cli.visualize.draw import draw_animation

        write_file(files["gif"], draw_animation(traced, picture))
    if "html" in files:
        from pmod_cli.visualize.page import build_page

        write_file(files["html"], build_page(traced, picture, **texts))


def _cut(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"
