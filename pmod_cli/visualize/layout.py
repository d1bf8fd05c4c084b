"""Where each vision token lies on the original picture.

What the image processor does to a picture (pad, resize, crop) moves each axis by a scale and an offset; undone,
they give the edges of the patches in pixels of the original. Padding is cut off: a patch that shows only padding has no
area.
"""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np

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
        """Of patches."""
        return len(self.y) - 1

    @property
    def columns(self) -> int:
        """Of patches."""
        return len(self.x) - 1

    @property
    def tokens(self) -> np.ndarray:
        """Positions of the patches' tokens among the picture's vision tokens, [rows, columns]."""
        return self.first + np.arange(self.rows)[:, None] * self.row_step + np.arange(self.columns)

    @property
    def end(self) -> int:
        """Position behind its last token, newline tokens included."""
        return self.first + self.rows * self.row_step


@dataclass(frozen=True)
class Layout:
    """All vision tokens of one picture.

    Attributes:
        width: Of the original picture, pixels.
        height: Likewise.
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

    length: float
    offset: float = 0.0
    scale: float = 1.0

    def pad(self, length: int) -> None:
        self.offset -= (length - self.length) // 2 * self.scale
        self.length = length

    def resize(self, length: int) -> None:
        self.scale *= self.length / length
        self.length = length

    def crop(self, length: int) -> None:
        self.offset += (self.length - length) // 2 * self.scale
        self.length = length

    def edges(self, positions: np.ndarray, extent: int) -> np.ndarray:
        return np.clip(self.offset + self.scale * positions, 0, extent)


@dataclass(frozen=True)
class _Cells:
    """Where in the pixels of all tiles a place among their cells is."""

    side: int
    grid: int
    patch: int

    def __call__(self, places: np.ndarray) -> np.ndarray:
        tile = np.floor(places / self.grid)
        return tile * self.side + (places - tile * self.grid) * self.patch


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
        return _anyres(model, size)
    return _one_tile(model.config.vision_config, image_processor, size)


def _one_tile(tower: Any, image_processor: Any, size: tuple[int, int]) -> Layout:
    across, down = _Axis(size[0]), _Axis(size[1])
    settings = image_processor.to_dict()
    if settings.get("do_pad"):
        for axis in (across, down):
            axis.pad(max(size))
    if settings.get("do_resize"):
        target = settings["size"]
        if target.get("shortest_edge"):
            shortest = min(across.length, down.length)
            lengths = [int(target["shortest_edge"] * axis.length / shortest) for axis in (across, down)]
        elif target.get("height") and target.get("width"):
            lengths = [target["width"], target["height"]]
        else:
            raise PmodError(f"an image processor that resizes to {target} is not supported here")
        for axis, length in zip((across, down), lengths, strict=True):
            axis.resize(length)
    if settings.get("do_center_crop"):
        across.crop(settings["crop_size"]["width"])
        down.crop(settings["crop_size"]["height"])
    grid = tower.image_size // tower.patch_size
    positions = tower.patch_size * np.arange(grid + 1)
    view = View("picture", 0, grid, across.edges(positions, size[0]), down.edges(positions, size[1]))
    return Layout(*size, (view,), view.end)


def _anyres(model: Any, size: tuple[int, int]) -> Layout:
    """LLaVA-NeXT: the whole picture squeezed into one tile, then a grid of tiles without its padding."""
    from transformers.image_processing_utils import select_best_resolution

    width, height = size
    tower = model.config.vision_config
    side, grid = tower.image_size, tower.image_size // tower.patch_size
    edges = tower.patch_size * np.arange(grid + 1) / side  # SigLIP's patches stop short of the tile's end
    whole = View("whole picture", 0, grid, width * edges, height * edges)
    pinpoints = [list(pinpoint) for pinpoint in model.config.image_grid_pinpoints]
    full_height, full_width = select_best_resolution((height, width), pinpoints)
    across, down = _Axis(width), _Axis(height)
    shown_width, shown_height = _fit(size, (full_width, full_height))
    across.resize(shown_width)
    down.resize(shown_height)
    across.pad(full_width)
    down.pad(full_height)
    tiles_across, tiles_down = full_width // side, full_height // side
    columns, rows, tokens = _kept_cells(model, size, tiles_across, tiles_down, grid)
    if not len(rows):
        return Layout(width, height, (whole,), tokens)
    pixels = _Cells(side, grid, tower.patch_size)
    tiles = View(
        f"sub-images, {tiles_across} x {tiles_down}",
        whole.end,
        len(columns),  # columns + 1 edges: as many as patches and their newline token
        across.edges(pixels(columns), width),
        down.edges(pixels(rows), height),
    )
    return Layout(width, height, (whole, tiles), tokens)


def _fit(size: tuple[int, int], full: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of the picture within its grid, as transformers' and LLaVA's processors round it."""
    from transformers.image_processing_utils import get_patch_output_size
    from transformers.image_utils import ChannelDimension

    blank = np.broadcast_to(np.zeros((1, 1, 1), np.uint8), (3, size[1], size[0]))
    height, width = get_patch_output_size(blank, full[::-1], ChannelDimension.FIRST)
    return width, height


def _kept_cells(
    model: Any, size: tuple[int, int], tiles_across: int, tiles_down: int, grid: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Edges of the columns and of the rows that are left of the tiles' cells, in cells; and all vision tokens.

    A picture that is too thin leaves no cell: the edges are then empty, though there may be newline tokens.

    The model's own function packs the features; here it packs coordinates in their place.
    """
    import torch

    rows = torch.arange(tiles_down * grid, dtype=torch.float64)
    columns = torch.arange(tiles_across * grid, dtype=torch.float64)
    cells = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
    tiles = cells.view(tiles_down, grid, tiles_across, grid, 2).transpose(1, 2).reshape(-1, grid * grid, 2)
    base = torch.zeros(1, grid * grid, 2, dtype=torch.float64)
    pack = model.model.pack_image_features
    known = ("vision_feature_select_strategy", "vision_aspect_ratio")  # families differ in which they take
    options = {name: getattr(model.config, name) for name in known if name in signature(pack).parameters}
    packed, _ = pack(
        [torch.cat([base, tiles])],
        torch.tensor([[size[1], size[0]]]),
        image_newline=torch.full((2,), -1.0, dtype=torch.float64),
        **options,
    )
    rest = packed[0][grid * grid :]
    ends = (rest[:, 0] < 0).nonzero().flatten()
    if not len(ends) or int(ends[0]) == 0:
        return np.empty(0), np.empty(0), len(packed[0])
    table = rest.view(len(ends), -1, 2)[:, :-1]
    return _edges(table[0, :, 1].numpy()), _edges(table[:, 0, 0].numpy()), len(packed[0])


def _edges(starts: np.ndarray) -> np.ndarray:
    """Edges of cells, from what they are called: a cell's own start, or a mean of several if they were shrunk."""
    if len(starts) < 2:
        return np.array([starts[0], starts[0] + 1])
    step = (starts[-1] - starts[0]) / (len(starts) - 1)
    first = starts[0] + 0.5 - step / 2
    return first + step * np.arange(len(starts) + 1)


def _patch_of_pixel(edges: np.ndarray, pixels: int, extent: int) -> tuple[np.ndarray, np.ndarray]:
    """Patch that shows each pixel's centre, and whether one does."""
    centres = (np.arange(pixels) + 0.5) * extent / pixels
    found = np.searchsorted(edges, centres, side="right") - 1
    inside = (centres >= edges[0]) & (centres < edges[-1])
    return np.clip(found, 0, len(edges) - 2), inside
