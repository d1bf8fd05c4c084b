"""A page about one prompt that needs nothing but itself: no network, no other file."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader
from PIL import Image

from pmod_cli import plots
from pmod_cli.visualize.trace import Trace

_LONG_SIDE = 1600
_LOSSLESS_PIXELS = 512 * 512
_HEAT = ["#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725"]
"""Nine stops of the heat map's colours (viridis), so that the page needs no matplotlib."""


def build_page(
    trace: Trace, image: Image.Image, *, model: str, prompt: str, answer: str, baseline: dict[str, str] | None
) -> str:
    """The page: a slider over the layers, the prompt, both answers, and each patch's router weights.

    ``model`` is how the user named it, ``baseline`` has the dense one's ``name`` and ``answer``.
    """
    layout = trace.layout
    data: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "answer": answer,
        "baseline": baseline,
        "image": plots.data_uri(plots.encode(image, _LONG_SIDE, _LOSSLESS_PIXELS)),
        "width": layout.width,
        "height": layout.height,
        "tokens": layout.tokens,
        "newlines": layout.newlines,
        "ratios": trace.ratios,
        # Row by row: one byte per token for "kept", a little-endian float32 for the weight (NaN: no router).
        "kept": base64.b64encode(trace.kept.astype(np.uint8).tobytes()).decode(),
        "weights": base64.b64encode(trace.weights.astype("<f4").tobytes()).decode(),
        "views": [
            {
                "name": view.name,
                "tokens": view.tokens.tolist(),
                "x": view.x.round(3).tolist(),
                "y": view.y.round(3).tolist(),
            }
            for view in layout.views
        ],
        "dim": [round(255 * plots.DIM), plots.DIM_SHARE],
        "heat": _HEAT,
    }
    page = Environment(loader=PackageLoader("pmod_cli.visualize", "."), autoescape=True)
    return page.get_template("page.html").render(css=plots.CSS, data=data)
