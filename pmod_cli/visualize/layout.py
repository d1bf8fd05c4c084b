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
from pmod_cli.output.errors import PmodError


@dataclass(frozen=True)
class View:
    """One grid of vision tokens over the picture.

    Attributes:
        name: What it is, in words.
        first: Position of its first token among the picture's vision tokens.
        row_step: Tokens from one row's first to the next's; one more than the columns if a newline token ends each row.
        x: Left and right edges of the columns, pixels of the original, ascending, [columns + 1].
        y: Upper and lower edges of the rows, [rows + 1].
    """

    name: str
    first: int
    row_step: int
    x: np.ndarray
    y: np.ndarray

    @property
    def rows(self) -> int:
        """Rows of patches."""
        return len(self.y) - 1

    @property
    def columns(self) -> int:
        """Columns of patches."""
        return len(self.x) - 1

    @property
    def tokens(self) -> np.ndarray:
        """Positions of the patches' tokens among the picture's vision tokens, [rows, columns]."""
        return self.first + np.arange(self.rows)[:, None] * self.row_step + np.arange(self.columns)


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
    grid = tower.image_size // tower.patch_size
    pixels = tower.patch_size * np.arange(grid + 1)
    view = View("picture", 0, grid, across.edges(pixels), down.edges(pixels))
    return Layout(*size, (view,), grid**2)


def _anyres(config: Any, size: tuple[int, int]) -> Layout:
    """LLaVA-NeXT: the whole picture squeezed into one tile, then a grid of tiles without its padding."""
    from transformers.image_processing_utils import select_best_resolution

    width, height = size
    tower = config.vision_config
    side, grid, patch = tower.image_size, tower.image_size // tower.patch_size, tower.patch_size
    edges = patch * np.arange(grid + 1) / side  # SigLIP's patches stop short of the tile's end
    whole = View("whole picture", 0, grid, width * edges, height * edges)

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
        grid**2,
        columns + 1,
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
