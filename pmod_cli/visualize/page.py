"""A page about one prompt that needs nothing but itself: no network, no other file."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader
from PIL import Image

from pmod_cli import plots
from pmod_cli.visualize.trace import Trace

_LONG_SIDE = 1600
_LOSSLESS_PIXELS = 512 * 512


def data_uri(image: Image.Image, longest: int = _LONG_SIDE) -> str:
    """A picture as text: PNG if it is small, else JPEG, made smaller if a side is longer than ``longest``."""
    image = image.convert("RGB")
    image.thumbnail((longest, longest))
    buffer = io.BytesIO()
    small = image.width * image.height <= _LOSSLESS_PIXELS
    image.save(buffer, "PNG" if small else "JPEG", optimize=True, **({} if small else {"quality": 90}))
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def build_page(
    trace: Trace, image: Image.Image, *, model: str, prompt: str, answer: str, baseline: dict[str, str] | None
) -> str:
    """The page: a slider over the layers, the prompt, both answers, and each patch's router weights.

    Args:
        trace: What the routers did.
        image: The picture.
        model: How the user named the model.
        prompt: What was asked.
        answer: What the model answered.
        baseline: ``name`` and ``answer`` of the dense baseline, or None.
    """
    layout = trace.layout
    data: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "answer": answer,
        "baseline": baseline,
        "image": data_uri(image),
        "width": layout.width,
        "height": layout.height,
        "tokens": layout.tokens,
        "newlines": layout.newlines,
        "ratios": trace.ratios,
        # Row by row: one byte per token for "kept", a little-endian float32 for the weight (NaN: no router).
        "kept": _base64(trace.kept.astype(np.uint8)),
        "weights": _base64(trace.weights.astype("<f4")),
        "views": [
            {
                "name": view.name,
                "first": view.first,
                "step": view.row_step,
                "x": [round(float(edge), 3) for edge in view.x],
                "y": [round(float(edge), 3) for edge in view.y],
            }
            for view in layout.views
        ],
        "dim": [round(255 * plots.DIM), plots.DIM_SHARE],
        "heat": _colours(),
    }
    page = Environment(loader=PackageLoader("pmod_cli.visualize", "."), autoescape=True)
    return page.get_template("page.html").render(css=plots.CSS, data=data)


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


def _colours() -> list[str]:
    """Nine stops of the heat map's colours (viridis), so that the page needs no matplotlib."""
    return ["#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725"]
