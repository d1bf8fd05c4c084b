"""The picture with what each layer kept: a sheet of chosen layers, and an animation through all of them."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from pmod_cli.output import plots
from pmod_cli.visualize.layout import Layout, View
from pmod_cli.visualize.trace import Trace

_ACROSS = 4
_LONG_SIDE = 720
_FRAME_MILLISECONDS = 500


def dim_dropped(picture: np.ndarray, layout: Layout, view: View, kept: np.ndarray) -> np.ndarray:
    """Mix the patches that were dropped with grey; what the model never saw becomes grey altogether.

    Args:
        picture: [height, width, 3], in [0, 1]; at any size.
        layout: Of its vision tokens.
        view: One of its grids.
        kept: By vision token, [tokens].

    Returns:
        The same shape.
    """
    size = picture.shape[1], picture.shape[0]
    share = layout.spread(view, np.where(kept, 0.0, plots.DIM_SHARE), size, outside=0.95)[..., None]
    return (1 - share) * picture + share * plots.DIM


def default_layers(trace: Trace, most: int = 6) -> list[int]:
    """Layers worth showing where the user names none: some that route, evenly spaced, first and last among them."""
    routed = [index for index, ratio in enumerate(trace.ratios) if ratio is not None]
    if len(routed) <= most:
        return routed
    return [routed[round(place)] for place in np.linspace(0, len(routed) - 1, most)]


def draw_sheet(trace: Trace, image: Image.Image, layers: Sequence[int], heading: str) -> Any:
    """One figure: the picture, what each chosen layer kept of it, how many layers each patch survived, retention.

    Args:
        trace: What the routers did.
        image: The picture.
        layers: Those to show.
        heading: Stands above.

    Returns:
        The figure; each panel's axes have a ``gid``: ``picture``, ``layer-N-VIEW`` or ``heat-VIEW``.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    picture = _pixels(image)
    panels: list[tuple[str, int | None, View | None]] = []  # what, layer, view
    rows = 0
    for number, grid_view in enumerate(trace.layout.views):
        first: list[tuple[str, int | None, View | None]] = [("picture", None, None)] if number == 0 else []
        block = [*first, *(("layer", layer, grid_view) for layer in layers), ("heat", None, grid_view)]
        rows += math.ceil(len(block) / _ACROSS)
        panels += block + [("", None, None)] * (-len(block) % _ACROSS)
    shape = min(max(picture.shape[0] / picture.shape[1], 0.4), 2.0)
    heights = [1.75 * shape + 0.32] * rows + [1.25]
    with plots.look():
        from matplotlib.figure import Figure

        drawn = Figure(figsize=(7.2, sum(heights) + 0.5), layout="constrained")
        grid = drawn.add_gridspec(rows + 1, _ACROSS, height_ratios=heights)
        for place, (what, layer, view) in enumerate(panels):
            axis = drawn.add_subplot(grid[place // _ACROSS, place % _ACROSS])
            axis.axis("off")
            if what == "picture":
                axis.imshow(picture)
                axis.set_gid("picture")
                axis.set_title(f"picture, {image.width} x {image.height}")
            elif layer is not None and view is not None:
                axis.imshow(dim_dropped(picture, trace.layout, view, trace.kept[layer]))
                axis.set_gid(f"layer-{layer}-{trace.layout.views.index(view)}")
                axis.set_title(_panel_title(trace, layer, view))
            elif view is not None:
                _heat(axis, trace, picture, view)
        _retention(drawn.add_subplot(grid[rows, :]), trace, layers)
        drawn.suptitle(heading)
    return drawn


def draw_animation(trace: Trace, image: Image.Image) -> bytes:
    """A GIF with one frame a layer.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    picture = _pixels(image)
    views = trace.layout.views
    shape = min(max(picture.shape[0] / picture.shape[1], 0.4), 2.0)
    frames = []
    with plots.look():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        width = 4.6 if len(views) == 1 else 7.2
        panel = width / len(views)
        drawn = Figure(figsize=(width, panel * shape + 1.6), layout="constrained", facecolor="white")
        canvas = FigureCanvasAgg(drawn)
        grid = drawn.add_gridspec(2, len(views), height_ratios=(panel * shape, 1.1))
        shown = []
        for column, view in enumerate(views):
            axis = drawn.add_subplot(grid[0, column])
            axis.axis("off")
            if len(views) > 1:
                axis.set_title(view.name)
            shown.append(axis.imshow(picture))
        bars = _retention(drawn.add_subplot(grid[1, :]), trace, ())
        heading = drawn.suptitle("")
        for layer in range(trace.layers):
            for artist, view in zip(shown, views, strict=True):
                artist.set_data(dim_dropped(picture, trace.layout, view, trace.kept[layer]))
            heading.set_text(trace.summary(layer))
            for index, bar in enumerate(bars):
                bar.set_alpha(1.0 if index == layer else 0.35)
            canvas.draw()
            frames.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy()))
    buffer = io.BytesIO()
    # One palette for all frames: dropped patches keep their grey from frame to frame.
    palette = _palette(frames)
    first, *rest = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    first.save(
        buffer, "GIF", save_all=True, append_images=rest, duration=_FRAME_MILLISECONDS, loop=0, optimize=False
    )
    return buffer.getvalue()


def _pixels(image: Image.Image) -> np.ndarray:
    """The picture at the size of a panel: patches of a small picture need sharp edges."""
    factor = _LONG_SIDE / max(image.size)
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    return np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC), dtype=np.float32) / 255


def _panel_title(trace: Trace, layer: int, view: View) -> str:
    kept = int(trace.kept[layer][view.tokens].sum())
    total = view.rows * view.columns
    where = "" if len(trace.layout.views) == 1 else f", {view.name.split(',')[0]}"
    return f"layer {layer}{where}\n{kept} of {total} ({100 * kept / total:.0f} %)"


def _heat(axis: Any, trace: Trace, picture: np.ndarray, view: View) -> None:
    size = picture.shape[1], picture.shape[0]
    counts = trace.layout.spread(view, trace.survived.astype(float), size, outside=np.nan)
    least = sum(ratio is None for ratio in trace.ratios)
    image = axis.imshow(counts, cmap=plots.HEAT, vmin=least, vmax=trace.layers)
    axis.set_gid(f"heat-{trace.layout.views.index(view)}")
    where = "" if len(trace.layout.views) == 1 else f", {view.name.split(',')[0]}"
    axis.set_title(f"layers survived\nof {trace.layers}{where}")
    bar = axis.figure.colorbar(image, cax=axis.inset_axes((0.0, -0.1, 1.0, 0.05)), orientation="horizontal")
    bar.outline.set_visible(False)
    bar.ax.xaxis.get_major_locator().set_params(integer=True, nbins=5)


def _retention(axis: Any, trace: Trace, chosen: Sequence[int]) -> Any:
    """Bars of the share of vision tokens that each layer keeps; chosen layers are marked."""
    shares = trace.kept.mean(1)
    colours = [plots.DENSE if ratio is None else plots.PMOD for ratio in trace.ratios]
    bars = axis.bar(range(trace.layers), 100 * shares, 0.72, color=colours)
    axis.scatter(chosen, [100 * shares[layer] + 6 for layer in chosen], marker="v", s=14, color=plots.INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y")
    step = max(1, math.ceil(trace.layers / 16))
    axis.set(
        xlabel="decoder layer", ylabel="tokens kept, %", ylim=(0, 112), xticks=range(0, trace.layers, step)
    )
    axis.set_xlim(-0.7, trace.layers - 0.3)
    axis.set_yticks([0, 50, 100])
    return bars


def _palette(frames: Sequence[Image.Image]) -> Image.Image:
    """256 colours for all frames, from a strip of some of them."""
    some = [frames[index] for index in sorted({0, len(frames) // 2, len(frames) - 1})]
    strip = Image.new("RGB", (some[0].width, sum(frame.height for frame in some)))
    for index, frame in enumerate(some):
        strip.paste(frame, (0, index * frame.height))
    return strip.quantize(256)
