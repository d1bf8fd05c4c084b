"""How many vision tokens and crops an image becomes, from the geometry alone; and the prompt that is profiled."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pmod_cli.families.anyres import high_resolution_size
from pmod_cli.output.errors import PmodError
from pmod_cli.profiling.geometry import Geometry

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ImageTokens:
    """What one image becomes: vision tokens, those of the base tile (the whole image) among them, and tower inputs.

    Attributes:
        patches: (rows, columns) of patches in each of the tower's inputs.
    """

    tokens: int
    base_tokens: int
    crops: int
    patches: tuple[int, int]


@dataclass(frozen=True)
class Workload:
    """What is profiled: one image and some text per sample.

    Attributes:
        image: Tokens and crops of the image; None for a prompt of text only.
        image_size: (height, width) of the image in pixels.
        text_tokens: Text tokens per sample, special tokens included.
        new_tokens: Tokens generated per sample.
        batch: Samples, all alike (no padding).
        dtype: Type of weights, activations and KV cache.
        all_logits: Whether prefill computes logits at every position (a plain ``forward``) or only at the last
            (as ``generate`` does).
    """

    image: ImageTokens | None
    image_size: tuple[int, int] | None
    text_tokens: int = 35
    new_tokens: int = 64
    batch: int = 1
    dtype: str = "bfloat16"
    all_logits: bool = True

    @property
    def vision_tokens(self) -> int:
        """Vision tokens per sample."""
        return self.image.tokens if self.image else 0

    @property
    def prompt_tokens(self) -> int:
        """Tokens per sample before generation."""
        return self.vision_tokens + self.text_tokens

    def routed_tokens(self, target: str) -> int:
        """Tokens per sample that an MoD layer chooses from; the others are always kept.

        Args:
            target: ``vision``, ``vision_hr`` or ``all``, as in the model's config. A prompt without an image is not
                routed; of an image that is one crop all tokens are high resolution.
        """
        if self.image is None:
            return 0
        if target == "all":
            return self.prompt_tokens
        tiled = self.image.crops > 1
        return self.vision_tokens - (self.image.base_tokens if target == "vision_hr" and tiled else 0)


def parse_size(text: str) -> tuple[int, int]:
    """Read ``WIDTHxHEIGHT`` in pixels as (height, width), which is transformers' order.

    Raises:
        PmodError: If it is not two positive numbers.
    """
    match = re.fullmatch(r"\s*([1-9]\d*)\s*[xX×]\s*([1-9]\d*)\s*", text)
    if not match:
        raise PmodError(f"image size {text!r} is not WIDTHxHEIGHT in pixels", "e.g. 672x672")
    return int(match[2]), int(match[1])


def default_image_size(geometry: Geometry) -> tuple[int, int]:
    """The (height, width) that gives the most vision tokens, what papers report; 768 x 1024 where any size is taken."""
    side = geometry.tower.image
    if side is None:
        return 768, 1024
    sizes = geometry.pinpoints or (
        (side, side),
        *(((3 * side, 4 * side), (4 * side, 4 * side)) if geometry.pictures else ()),
    )
    return max(sizes, key=lambda size: image_tokens(geometry, size).tokens)


def image_tokens(geometry: Geometry, size: tuple[int, int]) -> ImageTokens:
    """Count vision tokens and crops of one image of (height, width) pixels, as the model's processor lays it out.

    LLaVA-1.5 sees every image as one crop. LLaVA-NeXT adds the tiles of the best grid, cuts off the grid's padding,
    and ends each row with a newline token (Liu et al. 2024, ``spatial_unpad``). LLaVA-OneVision shrinks what is left
    if it is more than the features of nine tiles (``anyres_max_9``). For other families see `pmod_cli.families.tiling`.

    Raises:
        PmodError: If the image is too thin for the grid to show any of it.
    """
    tower = geometry.tower
    base, patches = tower.selected, (tower.grid, tower.grid)
    if geometry.pictures is not None:
        try:
            cut = geometry.pictures.cut(size)
        except ValueError as error:
            raise PmodError(str(error)) from error
        tokens = tower.rows(cut.patches)
        return ImageTokens(cut.inputs * tokens, tokens, cut.inputs, cut.patches)
    if not geometry.pinpoints:
        return ImageTokens(base, base, 1, patches)
    assert tower.image is not None
    grid_height, grid_width = _best_grid(size, geometry.pinpoints)
    tiles = grid_height // tower.image, grid_width // tower.image
    rows, columns = high_resolution_size(
        size, tiles, tower.grid, geometry.max_tiles, released=geometry.released_anyres
    )
    return ImageTokens(base + rows * (columns + 1), base, 1 + tiles[0] * tiles[1], patches)


def _best_grid(size: tuple[int, int], grids: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The grid that shows most of the image's pixels; of equals the one that wastes least, then the first."""
    height, width = size

    def fitness(grid: tuple[int, int]) -> tuple[int, int]:
        scale = min(grid[1] / width, grid[0] / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, -(grid[0] * grid[1] - shown)

    best = max(grids, key=fitness)
    if fitness(best)[0] == 0:
        raise PmodError(f"an image of {width}x{height} pixels is too thin for the model's grids")
    return best
