"""The whole of ``pmod visualize``: load, prefill once with the routing recorded, answer, draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pmod_cli.generation import Answer, Prompt, VisionLanguageModel, open_image, read_config
from pmod_cli.output import plots as style
from pmod_cli.output.errors import PmodError
from pmod_cli.visualize.trace import Trace, check_routes, dense_twin, trace

PROGRAM = "pmod visualize"
"""Stands in the metadata of the sheets."""


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
    device: str | None = None,
) -> dict[str, Any]:
    """Draw what each layer of a p-MoD model kept of a picture.

    Args:
        model: p-MoD checkpoint folder or hub id.
        image: The picture's file.
        prompt: The question.
        files: What to write: ``sheet``, ``gif``, ``html``.
        layers: Those on the sheet; some that route by default.
        baseline: ``auto`` (the same weights without routers), ``none``, or a dense checkpoint.
        max_new_tokens: Of an answer.
        dtype: See `VisionLanguageModel.load`.
        device: See `VisionLanguageModel.load`.

    Returns:
        What ``pmod visualize --json`` prints (see ``docs/visualize.md``).

    Raises:
        PmodError: A source or picture that cannot be used, a dense model, a layer that does not exist.
    """
    config = read_config(model)
    check_routes(config)
    count = config.text_config.num_hidden_layers
    for layer in layers or ():
        if not 0 <= layer < count:
            raise PmodError(f"--layers: there is no layer {layer}", f"the model has 0 to {count - 1}")
    if baseline not in ("auto", "none"):
        read_config(baseline)
    picture = open_image(image)
    loaded = VisionLanguageModel.load(model, dtype=dtype, device=device)
    question = Prompt(prompt, (picture,))
    traced = trace(loaded, question)
    [answer] = loaded.generate([question], max_new_tokens=max_new_tokens)
    other = _baseline_answer(loaded, baseline, question, max_new_tokens, dtype, device)
    _draw(traced, picture, files, layers, model, prompt, answer, other)
    return {
        "model": model,
        "image": str(image),
        "prompt": prompt,
        "answer": answer.text,
        "baseline": other,
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


def _baseline_answer(
    loaded: VisionLanguageModel,
    baseline: str,
    question: Prompt,
    max_new_tokens: int,
    dtype: str,
    device: str | None,
) -> dict[str, str] | None:
    if baseline == "none":
        return None
    if baseline == "auto":
        name, dense = "the same weights, every layer dense", dense_twin(loaded)
    else:
        name, dense = baseline, VisionLanguageModel.load(baseline, dtype=dtype, device=device)
    [answer] = dense.generate([question], max_new_tokens=max_new_tokens)
    return {"name": name, "answer": answer.text}


def _draw(
    traced: Trace,
    picture: Any,
    files: Mapping[str, Path],
    layers: Sequence[int] | None,
    model: str,
    prompt: str,
    answer: Answer,
    other: dict[str, str] | None,
) -> None:
    if "sheet" in files or "gif" in files:
        from pmod_cli.visualize.draw import default_layers, draw_animation, draw_sheet

        if "sheet" in files:
            heading = f"“{_cut(prompt, 70)}”  →  “{_cut(answer.text, 40)}”"
            chosen = default_layers(traced) if layers is None else layers
            sheet = draw_sheet(traced, picture, chosen, heading)
            style.save(sheet, files["sheet"], title=heading, program=PROGRAM, dpi=200)
        if "gif" in files:
            style.write(files["gif"], draw_animation(traced, picture))
    if "html" in files:
        from pmod_cli.visualize.page import build_page

        page = build_page(traced, picture, model=model, prompt=prompt, answer=answer.text, baseline=other)
        style.write(files["html"], page)


def _cut(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"
