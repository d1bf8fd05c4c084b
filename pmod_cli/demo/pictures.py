"""The demo's two pictures: retention and FLOPs by layer, and the patches that each layer kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pmod_cli.errors import MissingExtraError

# Two colours of the Okabe-Ito palette, told apart by every kind of colour vision and in grey.
DENSE, PMOD = "#999999", "#0072B2"


def draw_layers(path: Path, ratios: Sequence[float | None], flops: dict[str, list[int]]) -> None:
    """Retention ratio by layer above FLOPs by layer, dense beside p-MoD.

    Args:
        path: The PNG to write.
        ratios: One a layer, None for a dense layer.
        flops: FLOPs of prefill by layer, for ``dense`` and ``pmod``.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure, (above, below) = _plots().subplots(2, 1, figsize=(6, 4.6), sharex=True, layout="constrained")
    layers = np.arange(len(ratios))
    above.bar(layers, [1.0 if ratio is None else ratio for ratio in ratios], color=PMOD, width=0.7)
    above.set(ylabel="vision tokens kept", ylim=(0, 1.05))
    width = 0.4
    for offset, role, label, colour in (
        (-width / 2, "dense", "dense", DENSE),
        (width / 2, "pmod", "p-MoD", PMOD),
    ):
        below.bar(layers + offset, [value / 1e6 for value in flops[role]], width, color=colour, label=label)
    below.set(xlabel="decoder layer", ylabel="prefill MFLOPs", xticks=layers)
    below.legend(frameon=False)
    _save(figure, path)


def draw_kept_patches(path: Path, picture: Path, kept: Sequence[Sequence[int]], patches: int) -> None:
    """The picture once a layer, with the patches that the layer dropped dimmed.

    Args:
        path: The PNG to write.
        picture: The image, square.
        kept: For each layer the kept patches, in raster order.
        patches: Patches of the image, a square number.
    """
    image = np.asarray(Image.open(picture).convert("RGB"), dtype=np.float32) / 255
    columns = min(4, len(kept))
    rows = math.ceil(len(kept) / columns)
    figure, axes = _plots().subplots(rows, columns, figsize=(2 * columns, 2.25 * rows), layout="constrained")
    for axis in np.ravel(axes):
        axis.axis("off")
    for layer, (axis, indices) in enumerate(zip(np.ravel(axes), kept, strict=False)):
        axis.imshow(dim_dropped(image, indices, patches))
        axis.set_title(f"layer {layer}: {len(indices)} of {patches}", fontsize=9)
    _save(figure, path)


def dim_dropped(image: np.ndarray, kept: Sequence[int], patches: int) -> np.ndarray:
    """Fade the patches that were dropped towards grey.

    Args:
        image: [height, width, 3], in [0, 1].
        kept: Kept patches, in raster order.
        patches: Patches of the image, a square number.
    """
    side = math.isqrt(patches)
    mask = np.zeros(patches, dtype=bool)
    mask[list(kept)] = True
    height, width = image.shape[:2]
    row, column = np.arange(height) * side // height, np.arange(width) * side // width
    seen = mask.reshape(side, side)[row][:, column, None]
    return np.where(seen, image, 0.8 * 0.45 + 0.2 * image)


def _plots() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise MissingExtraError("matplotlib", "plot") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plots

    return plots


def _save(figure: Any, path: Path) -> None:
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=150, format="png")
    _plots().close(figure)
    temporary.replace(path)
