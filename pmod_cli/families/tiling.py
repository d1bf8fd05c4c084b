"""How pictures are cut for the vision tower, by their sizes alone (no torch); tests compare with transformers.

Sizes are (height, width) in pixels, grids (rows, columns). LLaVA-NeXT's way is in `pmod_cli.families.anyres`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pmod_cli.output.errors import PmodError

Pair = tuple[int, int]

MOST_STRETCHED = 200
"""Qwen's processors refuse pictures whose sides differ by more than this factor."""


def fitted_size(size: Pair, multiple: int, least: int, most: int) -> Pair:
    """The size in which Qwen's models see a picture: sides rounded to a multiple, the area within limits.

    Args:
        size: Of the picture.
        multiple: Side of a token in pixels.
        least: Smallest area, pixels.
        most: Largest area, pixels.

    Raises:
        ValueError: If it is too thin.
    """
    height, width = size
    if max(size) > MOST_STRETCHED * min(size):
        raise ValueError(
            f"a side of the picture of {width}x{height} is more than {MOST_STRETCHED} times the other"
        )
    rounded = [round(side / multiple) * multiple for side in size]
    area = rounded[0] * rounded[1]
    if area > most:
        shrink = math.sqrt(height * width / most)
        rounded = [max(multiple, math.floor(side / shrink / multiple) * multiple) for side in size]
    elif area < least:
        grow = math.sqrt(least / (height * width))
        rounded = [math.ceil(side * grow / multiple) * multiple for side in size]
    return rounded[0], rounded[1]


def tile_grid(size: Pair, tile: Pair, fewest: int, most: int) -> Pair:
    """InternVL's grid: that of ``fewest`` to ``most`` tiles whose shape is most like the picture's.

    Of grids that are equally like it, the larger one if the picture has more than half of its pixels.
    """
    height, width = size
    best, difference = (1, 1), math.inf
    grids = [(rows, columns) for columns in range(1, most + 1) for rows in range(1, most + 1)]
    fitting = [(rows, columns) for rows, columns in grids if fewest <= rows * columns <= most]
    for rows, columns in sorted(fitting, key=lambda grid: grid[0] * grid[1]):
        off = abs(width / height - columns / rows)
        large = height * width > 0.5 * tile[0] * tile[1] * rows * columns
        if off < difference or (off == difference and large):
            best, difference = (rows, columns), off
    return best


def split_grid(size: Pair, longest: int, tile: int) -> Pair:
    """Idefics3's grid: the picture's longer side becomes ``longest``, then both a multiple of the tile."""
    height, width = size
    if width >= height:
        width, height = longest, int(longest / (width / height))
        height = max(height + height % 2, 1)
        columns = math.ceil(width / tile)
        return math.ceil(int(columns * tile / (width / height)) / tile), columns
    width, height = int(longest * (width / height)), longest
    width = max(width + width % 2, 1)
    rows = math.ceil(height / tile)
    return rows, math.ceil(int(rows * tile * (width / height)) / tile)


@dataclass(frozen=True)
class Cut:
    """What becomes of one picture.

    Attributes:
        patches: (rows, columns) of patches in each input of the tower.
        tiles: (rows, columns) of inputs that together show the picture.
        whole: Whether one more, the last, shows it whole.
    """

    patches: Pair
    tiles: Pair = (1, 1)
    whole: bool = False

    @property
    def inputs(self) -> int:
        """Inputs of the tower."""
        return self.tiles[0] * self.tiles[1] + self.whole


@dataclass(frozen=True)
class Cutting:
    """How an image processor cuts pictures: at most one of the three ways.

    Attributes:
        patch: Side of a patch, pixels.
        merge: Patches along a side of a token.
        tile: Side of the tower's square input, pixels; None where pictures keep their shape.
        area: Smallest and largest area, pixels, of pictures that keep their shape.
        tiles: Fewest and most tiles (InternVL).
        longest: Longer side before cutting (Idefics3); None if another way.
    """

    patch: int
    merge: int
    tile: int | None = None
    area: Pair = (0, 0)
    tiles: Pair | None = None
    longest: int | None = None

    def cut(self, size: Pair) -> Cut:
        """What becomes of a picture of this size; a ValueError if it is too thin."""
        if self.tile is None:
            height, width = fitted_size(size, self.patch * self.merge, *self.area)
            return Cut((height // self.patch, width // self.patch))
        grid = (1, 1)
        if self.tiles is not None:
            grid = tile_grid(size, (self.tile, self.tile), *self.tiles)
        elif self.longest is not None:
            grid = split_grid(size, self.longest, self.tile)
        return Cut((self.tile // self.patch,) * 2, grid, grid != (1, 1))

    def tokens(self, size: Pair) -> int:
        """Vision tokens of a picture of this size."""
        cut = self.cut(size)
        return cut.inputs * cut.patches[0] * cut.patches[1] // self.merge**2


def cutting(config: dict[str, Any], pictures: dict[str, Any]) -> Cutting | None:
    """How pictures are cut; None for families whose way does not depend on these settings (`families.anyres`).

    Args:
        config: A completed dense ``config.json``.
        pictures: The image processor's settings; those of the family's published models where it says nothing.

    Raises:
        PmodError: They are cut, but not resized.
    """
    if pictures.get("do_resize") is False:
        raise PmodError(
            "how many tokens pictures become is only known where the image processor resizes them"
        )
    vision, size = config["vision_config"], pictures.get("size") or {}
    if "spatial_merge_size" in vision:
        known = _AREAS.get(config["model_type"], _AREAS["qwen2_vl"])
        least = pictures.get("min_pixels") or size.get("shortest_edge") or known[0]
        most = pictures.get("max_pixels") or size.get("longest_edge") or known[1]
        return Cutting(_one(vision["patch_size"]), vision["spatial_merge_size"], area=(least, most))
    if config.get("downsample_ratio") and "image_seq_length" in config:
        tile, patch = _one(vision["image_size"]), _one(vision["patch_size"])
        limits = pictures.get("min_patches", 1), pictures.get("max_patches", 12)
        return Cutting(patch, round(1 / config["downsample_ratio"]), tile, tiles=limits)
    if "scale_factor" in config:
        tile = vision["image_size"]
        longest = size.get("longest_edge") or 4 * tile
        split = pictures.get("do_image_splitting", True)
        return Cutting(vision["patch_size"], config["scale_factor"], tile, longest=longest if split else None)
    return None


_AREAS = {"qwen2_vl": (3136, 12845056), "qwen2_5_vl": (3136, 12845056), "qwen3_vl": (65536, 16777216)}
"""Smallest and largest area of a picture, pixels, by model type, as published."""


def _one(side: Any) -> int:
    return int(side[0] if isinstance(side, (list, tuple)) else side)
