"""The picture with what each layer kept: a sheet of chosen layers, and an animation through all of them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from pmod_cli import plots
from pmod_cli.output.marks import TAG
from pmod_cli.visualize.layout import Layout, View
from pmod_cli.visualize.trace import Trace

_ACROSS = 4
_LONG_SIDE = 720
_FRAME_MILLISECONDS = 500


def dim_dropped(picture: np.ndarray, layout: Layout, view: View, kept: np.ndarray) -> np.ndarray:
    """Mix the patches that were dropped with grey; what the model never saw becomes grey altogether.

    ``picture`` is [height, width, 3] in [0, 1], at any size; ``kept`` is by vision token, [tokens].
    """
    size = picture.shape[1], picture.shape[0]
    share = layout.spread(view, np.where(kept, 0.0, plots.DIM_SHARE), size, outside=0.95)[..., None]
    return (1 - share) * picture + share * plots.DIM


def default_layers(trace: Trace, most: int = 6) -> list[int]:
    """Layers worth showing where the user names none: some that route, evenly spaced, first and last among them."""
    routed = [index for index, ratio in enumerate(trace.ratios) if ratio is not None]
    if len(routed) <= most:
        return routed
    return [routed[round(index)] for index in np.linspace(0, len(routed) - 1, most)]


def draw_sheet(trace: Trace, image: Image.Image, layers: Sequence[int], heading: str) -> Any:
    """One figure: the picture, what each chosen layer kept of it, how many layers each patch survived, retention.

    Returns:
        The figure; each panel's axes have a ``gid``: ``picture``, ``layer-N-VIEW`` or ``heat-VIEW``.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    picture = _pixels(image)
    rows: list[list[tuple[View, int | str]]] = []
    for view in trace.layout.views:
        panels: list[int | str] = [*([] if rows else ["picture"]), *layers, "heat"]
        for start in range(0, len(panels), _ACROSS):
            rows.append([(view, panel) for panel in panels[start : start + _ACROSS]])
    heights = [1.75 * _shape(picture) + 0.32] * len(rows) + [1.25]
    with plots.look():
        from matplotlib.figure import Figure

        drawn = Figure(figsize=(7.2, sum(heights) + 0.5), layout="constrained")
        grid = drawn.add_gridspec(len(rows) + 1, _ACROSS, height_ratios=heights)
        for row, row_panels in enumerate(rows):
            for column, (view, panel) in enumerate(row_panels):
                axis = drawn.add_subplot(grid[row, column])
                axis.axis("off")
                if panel == "picture":
                    axis.imshow(picture)
                    axis.set_gid(panel)
                    axis.set_title(f"picture, {image.width} x {image.height}")
                elif panel == "heat":
                    _draw_heat(axis, trace, picture, view)
                else:
                    _draw_layer(axis, trace, picture, view, int(panel))
        _draw_retention(drawn.add_subplot(grid[len(rows), :]), trace, layers)
        drawn.suptitle(heading)
    return drawn


def draw_animation(trace: Trace, image: Image.Image) -> bytes:
    """A GIF with one frame per layer.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    picture = _pixels(image)
    views = trace.layout.views
    frames = []
    with plots.look():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        width = 4.6 if len(views) == 1 else 7.2
        panel = width / len(views)
        drawn = Figure(
            figsize=(width, panel * _shape(picture) + 1.6), layout="constrained", facecolor="white"
        )
        canvas = FigureCanvasAgg(drawn)
        grid = drawn.add_gridspec(2, len(views), height_ratios=(panel * _shape(picture), 1.1))
        shown = []
        for column, view in enumerate(views):
            axis = drawn.add_subplot(grid[0, column])
            axis.axis("off")
            if len(views) > 1:
                axis.set_title(view.name)
            shown.append(axis.imshow(picture))
        bars = _draw_retention(drawn.add_subplot(grid[1, :]), trace, ())
        heading = drawn.suptitle("")
        for layer in range(trace.layers):
            for artist, view in zip(shown, views, strict=True):
                artist.set_data(dim_dropped(picture, trace.layout, view, trace.kept[layer]))
            kept, total = trace.kept[layer].sum(), trace.layout.tokens
            share = "dense" if trace.ratios[layer] is None else f"{100 * kept / total:.0f} %"
            heading.set_text(f"layer {layer}: {kept} of {total} ({share})")
            for index, bar in enumerate(bars):
                bar.set_alpha(1.0 if index == layer else 0.35)
            canvas.draw()
            frames.append(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    # One palette for all frames: dropped patches keep their grey from frame to frame.
    palette = Image.fromarray(np.vstack([frames[0], frames[len(frames) // 2], frames[-1]])).quantize(256)
    first, *rest = [
        Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames
    ]
    buffer = io.BytesIO()
    first.save(
        buffer,
        "GIF",
        save_all=True,
        append_images=rest,
        duration=_FRAME_MILLISECONDS,
        loop=0,
        optimize=False,
        comment=TAG.encode(),
    )
    return buffer.getvalue()


def _pixels(image: Image.Image) -> np.ndarray:
    """The picture at the size of a panel: patches of a small picture need sharp edges."""
    factor = _LONG_SIDE / max(image.size)
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    return np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC), dtype=np.float32) / 255


def _shape(picture: np.ndarray) -> float:
    """Height of a panel over its width: the picture's, unless it is very thin."""
    return min(max(picture.shape[0] / picture.shape[1], 0.4), 2.0)


def _draw_layer(axis: Any, trace: Trace, picture: np.ndarray, view: View, layer: int) -> None:
    axis.imshow(dim_dropped(picture, trace.layout, view, trace.kept[layer]))
    axis.set_gid(f"layer-{layer}-{trace.layout.views.index(view)}")
    kept, total = int(trace.kept[layer][view.tokens].sum()), view.rows * view.columns
    axis.set_title(f"layer {layer}{_of_view(trace, view)}\n{kept} of {total} ({100 * kept / total:.0f} %)")


def _draw_heat(axis: Any, trace: Trace, picture: np.ndarray, view: View) -> None:
    size = picture.shape[1], picture.shape[0]
    counts = trace.layout.spread(view, trace.survived.astype(float), size, outside=np.nan)
    least = sum(ratio is None for ratio in trace.ratios)
    image = axis.imshow(counts, cmap=plots.HEAT, vmin=least, vmax=trace.layers)
    axis.set_gid(f"heat-{trace.layout.views.index(view)}")
    axis.set_title(f"layers survived\nof {trace.layers}{_of_view(trace, view)}")
    bar = axis.figure.colorbar(image, cax=axis.inset_axes((0.0, -0.1, 1.0, 0.05)), orientation="horizontal")
    bar.outline.set_visible(False)
    bar.ax.xaxis.get_major_locator().set_params(integer=True, nbins=5)


def _of_view(trace: Trace, view: View) -> str:
    """Which view a panel shows, where there are several."""
    return "" if len(trace.layout.views) == 1 else f", {view.name.split(',')[0]}"


def _draw_retention(axis: Any, trace: Trace, chosen: Sequence[int]) -> Any:
    """Bars of the share of vision tokens that each layer keeps; chosen layers are marked."""
    shares = trace.kept.mean(1)
    bars = plots.retention_bars(axis, trace.ratios, shares)
    axis.scatter(chosen, [100 * shares[layer] + 6 for layer in chosen], marker="v", s=14, color=plots.INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y")
    return bars
