"""Where each vision token lies on the original picture.

What the image processor does to a picture (pad, resize, crop) moves each axis by a scale and an offset; undone,
they give the edges of the patches in pixels of the original. Padding is cut off: a patch that shows only padding has no
area.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from pmod_cli.families.anyres import shrunk_size, unpadded_box
from pmod_cli.families.tiling import Cutting, cutting
from pmod_cli.output.errors import PmodError


@dataclass(frozen=True)
class View:
    """One grid of vision tokens over the picture.

    Attributes:
        name: What it is, in words.
        tokens: Positions of the patches' tokens among the picture's vision tokens, [rows, columns].
        x: Left and right edges of the columns, pixels of the original, ascending, [columns + 1].
        y: Upper and lower edges of the rows, [rows + 1].
    """

    name: str
    tokens: np.ndarray
    x: np.ndarray
    y: np.ndarray

    @property
    def first(self) -> int:
        """Position of its first token."""
        return int(self.tokens[0, 0])

    @property
    def rows(self) -> int:
        """Rows of patches."""
        return len(self.y) - 1

    @property
    def columns(self) -> int:
        """Columns of patches."""
        return len(self.x) - 1


@dataclass(frozen=True)
class Layout:
    """All vision tokens of one picture.

    Attributes:
        width: Of the original picture, pixels; ``height`` likewise.
        views: Grids over it: one for LLaVA-1.5; the whole picture's and the sub-images' for LLaVA-NeXT.
        tokens: Vision tokens, newline tokens included.
    """

    width: int
    height: int
    views: tuple[View, ...]
    tokens: int

    @property
    def newlines(self) -> int:
        """Tokens that end a row of the sub-images and show nothing."""
        return self.tokens - sum(view.rows * view.columns for view in self.views)

    def spread(self, view: View, values: np.ndarray, size: tuple[int, int], outside: Any) -> np.ndarray:
        """One value per pixel from one value per token.

        Args:
            view: One of `views`.
            values: By vision token, [tokens].
            size: (width, height) of the picture as it is drawn, which may be another than the original's.
            outside: For pixels that no patch shows.

        Returns:
            [height, width].
        """
        columns, across = _patch_of_pixel(view.x, size[0], self.width)
        rows, down = _patch_of_pixel(view.y, size[1], self.height)
        return np.where(down[:, None] & across, values[view.tokens][rows][:, columns], outside)


@dataclass
class _Axis:
    """One axis of what the tower sees: ``original = offset + scale * pixel``."""

    extent: int
    length: float
    offset: float = 0.0
    scale: float = 1.0

    def resize(self, length: int) -> None:
        self.scale *= self.length / length
        self.length = length

    def pad_or_crop(self, length: int) -> None:
        """Equally at both ends."""
        self.offset += int((self.length - length) / 2) * self.scale
        self.length = length

    def edges(self, pixels: np.ndarray) -> np.ndarray:
        return np.clip(self.offset + self.scale * pixels, 0, self.extent)


def _rows(rows: int, columns: int, first: int = 0, step: int | None = None) -> np.ndarray:
    """Positions of tokens that lie row by row; ``step`` tokens from one row's first to the next's."""
    return first + np.arange(rows)[:, None] * (columns if step is None else step) + np.arange(columns)


def lay_out(model: Any, image_processor: Any, size: tuple[int, int]) -> Layout:
    """Lay a picture's vision tokens out on it.

    Args:
        model: A transformers image-text-to-text model, dense or p-MoD.
        image_processor: Its image processor.
        size: (width, height) of the picture, pixels.

    Raises:
        PmodError: The image processor does something that is not known here.
    """
    if getattr(model.config, "image_grid_pinpoints", None):
        return _anyres(model.config, size)
    tower, settings = model.config.vision_config, image_processor.to_dict()
    cuts = cutting(model.config.to_dict(), settings)
    if cuts is not None:
        return _stretched(cuts, size)
    across, down = (_Axis(length, length) for length in size)
    if settings.get("do_pad"):
        for axis in (across, down):
            axis.pad_or_crop(max(size))
    if settings.get("do_resize"):
        target = settings["size"]
        if target.get("shortest_edge"):
            shortest = min(across.length, down.length)
            lengths = [int(target["shortest_edge"] * axis.length / shortest) for axis in (across, down)]
        elif target.get("height") and target.get("width"):
            lengths = [target["width"], target["height"]]
        else:
            raise PmodError(f"an image processor that resizes to {target} is not supported here")
        across.resize(lengths[0])
        down.resize(lengths[1])
    if settings.get("do_center_crop"):
        across.pad_or_crop(settings["crop_size"]["width"])
        down.pad_or_crop(settings["crop_size"]["height"])
    if not all(isinstance(getattr(tower, name, None), int) for name in ("image_size", "patch_size")):
        raise PmodError(f"where the patches of a {tower.model_type} lie is not known here")
    grid = tower.image_size // tower.patch_size
    pixels = tower.patch_size * np.arange(grid + 1)
    view = View("picture", _rows(grid, grid), across.edges(pixels), down.edges(pixels))
    return Layout(*size, (view,), grid**2)


def _stretched(cuts: Cutting, size: tuple[int, int]) -> Layout:
    """Pictures that are resized to whole tokens or tiles, without padding; the whole picture's tile comes last."""
    width, height = size
    cut = cuts.cut((height, width))
    rows, columns = (patches // cuts.merge for patches in cut.patches)

    def view(name: str, tokens: np.ndarray) -> View:
        down, across = tokens.shape
        return View(name, tokens, np.linspace(0, width, across + 1), np.linspace(0, height, down + 1))

    if not cut.whole:
        return Layout(width, height, (view("picture", _rows(rows, columns)),), rows * columns)
    # Tile by tile: [down, rows, across, columns].
    order = np.arange(cut.tiles[0] * cut.tiles[1] * rows * columns).reshape(*cut.tiles, rows, columns)
    tiles = order.transpose(0, 2, 1, 3).reshape(cut.tiles[0] * rows, cut.tiles[1] * columns)
    name = f"sub-images, {cut.tiles[1]} x {cut.tiles[0]}"
    whole = view("whole picture", _rows(rows, columns, order.size))
    return Layout(width, height, (whole, view(name, tiles)), order.size + whole.tokens.size)


def _anyres(config: Any, size: tuple[int, int]) -> Layout:
    """LLaVA-NeXT: the whole picture squeezed into one tile, then a grid of tiles without its padding."""
    from transformers.image_processing_utils import select_best_resolution

    width, height = size
    tower = config.vision_config
    side, grid, patch = tower.image_size, tower.image_size // tower.patch_size, tower.patch_size
    edges = patch * np.arange(grid + 1) / side  # SigLIP's patches stop short of the tile's end
    whole = View("whole picture", _rows(grid, grid), width * edges, height * edges)

    pinpoints = [list(pinpoint) for pinpoint in config.image_grid_pinpoints]
    full_height, full_width = select_best_resolution((height, width), pinpoints)
    scale = min(full_width / width, full_height / height)
    across, down = _Axis(width, width), _Axis(height, height)
    for axis, full in ((across, full_width), (down, full_height)):
        axis.resize(min(math.ceil(axis.extent * scale), full))
        axis.pad_or_crop(full)

    tiles_across, tiles_down = full_width // side, full_height // side
    released = bool(getattr(config, "released_anyres", False))
    limit = re.fullmatch(r"anyres_max_(\d+)", getattr(config, "vision_aspect_ratio", None) or "")
    most = int(limit[1]) if limit else getattr(config, "max_num_patches", None)
    top, bottom, left, right = unpadded_box(
        (height, width), (tiles_down * grid, tiles_across * grid), released
    )
    rows, columns = shrunk_size((bottom - top, right - left), grid, most, released)
    tokens = grid**2 + rows * (columns + 1)  # each row ends in a newline token
    if not rows or not columns:  # too thin a picture leaves no patch
        return Layout(width, height, (whole,), tokens)

    def pixels(cells: np.ndarray) -> np.ndarray:
        tile = np.floor(cells / grid)
        return tile * side + (cells - tile * grid) * patch

    tiles = View(
        f"sub-images, {tiles_across} x {tiles_down}",
        _rows(rows, columns, grid**2, columns + 1),
        across.edges(pixels(np.linspace(left, right, columns + 1))),
        down.edges(pixels(np.linspace(top, bottom, rows + 1))),
    )
    return Layout(width, height, (whole, tiles), tokens)


def _patch_of_pixel(edges: np.ndarray, pixels: int, extent: int) -> tuple[np.ndarray, np.ndarray]:
    """Patch that shows each pixel's centre, and whether one does."""
    centres = (np.arange(pixels) + 0.5) * extent / pixels
    found = np.searchsorted(edges, centres, side="right") - 1
    inside = (centres >= edges[0]) & (centres < edges[-1])
    return np.clip(found, 0, len(edges) - 2), inside
