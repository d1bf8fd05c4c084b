"""Geometry of LLaVA-NeXT's high-resolution feature map, as the paper's release and as transformers compute it.

transformers rounds to seven digits before it truncates (``int(round(x, 7))``) where the release truncates
(``int(x)``), so 58 of the image sizes up to 2048 x 2048 get another number of tokens. Both can shrink a large map
(``anyres_max_N``), in transformers LLaVA-OneVision's only, and later than in the release.
"""

from __future__ import annotations

import math

SHRINK_ABOVE = {True: 1.01, False: 1.1}
"""A feature map is shrunk if its side is more than so many times too long: in the release, and in transformers."""


def unpadded_box(
    image: tuple[int, int], current: tuple[int, int], released: bool = True
) -> tuple[int, int, int, int]:
    """The part of a padded feature map that shows the image.

    Args:
        image: (height, width) of the image in pixels.
        current: (height, width) of the feature map of all its tiles.
        released: Whether as in the release, else as in transformers.

    Returns:
        (top, bottom, left, right) in the map, ends excluded. The same number of lines is cut on both sides, so
        one more than computed may be left.
    """
    (image_height, image_width), (height, width) = image, current
    if image_width / image_height > width / height:
        cut = (height - _shown(image_height, width / image_width, released)) // 2
        return cut, height - cut, 0, width
    cut = (width - _shown(image_width, height / image_height, released)) // 2
    return 0, height, cut, width - cut


def _shown(side: int, scale: float, released: bool) -> int:
    return int(side * scale) if released else int(round(side * scale, 7))


def shrunk_size(
    size: tuple[int, int], side: int, max_num_patches: int | None, released: bool = True
) -> tuple[int, int]:
    """The size to which a feature map is interpolated.

    Args:
        size: (height, width) of the unpadded map.
        side: Features along one side of a tile.
        max_num_patches: The map gets at most about as many features as so many tiles; None for no limit.
        released: See `unpadded_box`.

    Returns:
        (height, width), the same if the map is not too large.
    """
    if max_num_patches is None:
        return size
    height, width = size
    times = math.sqrt(height * width / (max_num_patches * side**2))
    return (int(height // times), int(width // times)) if times > SHRINK_ABOVE[released] else size


def high_resolution_size(
    image: tuple[int, int],
    grid: tuple[int, int],
    side: int,
    max_num_patches: int | None = None,
    released: bool = True,
) -> tuple[int, int]:
    """Rows and columns of an image's high-resolution features, the newline column left out.

    Args:
        image: (height, width) of the image in pixels.
        grid: Tiles (down, across).
        side: Features along one side of a tile.
        max_num_patches: See `shrunk_size`.
        released: See `unpadded_box`.
    """
    top, bottom, left, right = unpadded_box(image, (grid[0] * side, grid[1] * side), released)
    return shrunk_size((bottom - top, right - left), side, max_num_patches, released)
