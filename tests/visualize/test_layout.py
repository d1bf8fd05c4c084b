"""Where vision tokens lie on the original picture: checked against what the image processor really does.

A picture that is black but for one rectangle goes through the processor; the patches of the tower's input that are
no longer black have to be those whose place on the original touches the rectangle.
"""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pmod_cli.prompts import Prompt
from pmod_cli.visualize.layout import lay_out
from tests.common import visual_models
from tests.common.visual_models import PATCH, SIDE

SIZES = [(80, 80), (120, 80), (80, 200), (333, 97), (61, 240), (500, 480)]


def brightness(loaded, image):
    """Mean brightness of each patch that the tower sees, [tiles, rows, columns]."""
    return of_patches(loaded.encode([Prompt("?", (image,))])["pixel_values"], SIDE, PATCH)


def of_patches(pixel_values, side, patch):
    pixels = pixel_values.reshape(-1, 3, side, side).numpy().mean(1)
    grid = side // patch
    return pixels[:, : grid * patch, : grid * patch].reshape(-1, grid, patch, grid, patch).mean((2, 4))


def marked(size, box):
    image = Image.new("RGB", size, "black")
    image.paste("white", box)
    return image


def touched(view, box):
    """Share of each patch (what it shows of the padding included) that lies in a box, [rows, columns]."""
    left, top, right, bottom = box
    across = np.clip(np.minimum(view.x[1:], right) - np.maximum(view.x[:-1], left), 0, None)
    down = np.clip(np.minimum(view.y[1:], bottom) - np.maximum(view.y[:-1], top), 0, None)
    # Patches are alike; those at the edge are cut where the padding begins.
    return np.outer(down, across) / (np.diff(view.y).max() * np.diff(view.x).max())


def boxes(size):
    width, height = size
    yield width // 3, height // 3, width // 3 + width // 4, height // 3 + height // 4
    yield 0, 0, width // 5, height // 5
    yield width - width // 5, height - height // 5, width, height


def agree(seen, expected, blur=0.03):
    """Patches well inside are bright, patches well outside dark; resampling blurs what is between."""
    assert seen[expected == 0].max(initial=0) < 0.45
    inside = expected > 0.999
    assert seen[inside].min(initial=1) > 0.6
    assert np.abs(seen - expected).mean() < blur
    assert expected.max() > 0.1


@pytest.mark.parametrize("size", SIZES)
def test_padded_picture(llava, size):
    layout = lay_out(llava.model, llava.processor.image_processor, size)
    [view] = layout.views
    assert layout.tokens == (SIDE // PATCH) ** 2
    for box in boxes(size):
        [seen] = brightness(llava, marked(size, box))
        agree(seen, touched(view, box))
    # Padding is cut off: along the longer side every patch shows something, along the shorter not.
    shown = np.count_nonzero(np.diff(view.x)), np.count_nonzero(np.diff(view.y))
    assert max(shown) == SIDE // PATCH
    assert min(shown) == pytest.approx(10 * min(size) / max(size), abs=2)


def test_centre_crop(llava):
    """Without padding, CLIP's processor crops: what it cuts off belongs to no patch."""
    processor = type(llava.processor.image_processor)(
        **llava.processor.image_processor.to_dict() | {"do_pad": False}
    )
    [view] = lay_out(llava.model, processor, (200, 100)).views
    assert (view.x[0], view.x[-1]) == (50, 150)
    assert (view.y[0], view.y[-1]) == (0, 100)


@pytest.mark.parametrize("size", SIZES)
def test_sub_images(llava_next, size):
    layout = lay_out(llava_next.model, llava_next.processor.image_processor, size)
    ids = llava_next.encode([Prompt("?", (Image.new("RGB", size),))])["input_ids"]
    assert layout.tokens == int((ids == llava_next.model.config.image_token_id).sum())
    whole, tiles = layout.views
    assert layout.newlines == tiles.rows
    for box in boxes(size):
        base, *parts = brightness(llava_next, marked(size, box))
        agree(base, touched(whole, box))
        agree(tokens_of_tiles(parts, tiles), touched(tiles, box))


@pytest.mark.parametrize("size", [(120, 80), (80, 200), (333, 150), (61, 240)])
def test_tiles_that_patches_do_not_fill(size):
    """LLaVA-OneVision's SigLIP leaves the last pixels of each tile out; so do the places of its patches."""
    model, processor = visual_models.dense_onevision()
    whole, tiles = lay_out(model, processor, size).views
    assert whole.x[-1] == pytest.approx(size[0] * 24 / 26)
    for box in boxes(size):
        pixels = processor(marked(size, box), return_tensors="pt")["pixel_values"]
        base, *parts = of_patches(pixels, 26, 8)
        agree(base, touched(whole, box), blur=0.06)
        agree(tokens_of_tiles(parts, tiles), touched(tiles, box), blur=0.06)


def tokens_of_tiles(parts, view):
    """The tiles' patches side by side, padding cut off as many rows or columns as there are too many."""
    name = view.name.split(", ")[1]
    across, down = (int(number) for number in name.split(" x "))
    grid = len(parts[0])
    joined = np.stack(parts).reshape(down, across, grid, grid).transpose(0, 2, 1, 3)
    joined = joined.reshape(down * grid, across * grid)
    rows, columns = (joined.shape[0] - view.rows) // 2, (joined.shape[1] - view.columns) // 2
    return joined[rows : rows + view.rows, columns : columns + view.columns]


def test_shrunk_map_covers_the_same():
    """``max_num_patches`` interpolates the map; fewer patches, each larger, over the same picture."""
    plain = visual_models.make("llava_next")
    shrunk = visual_models.make("llava_next", released_anyres=True, max_num_patches=1)
    size = (300, 260)
    before, after = (
        lay_out(loaded.model, loaded.processor.image_processor, size).views[1] for loaded in (plain, shrunk)
    )
    assert after.rows * after.columns < before.rows * before.columns
    assert (after.x[0], after.x[-1]) == pytest.approx((before.x[0], before.x[-1]), abs=8)
    assert (after.y[0], after.y[-1]) == pytest.approx((before.y[0], before.y[-1]), abs=8)


@pytest.mark.parametrize(("size", "tokens"), [((2000, 21), 100), ((21, 2000), 130)])
def test_too_thin_for_tiles(llava_next, size, tokens):
    """A map of which nothing is left leaves the whole picture's tile, and may leave newline tokens."""
    layout = lay_out(llava_next.model, llava_next.processor.image_processor, size)
    ids = llava_next.encode([Prompt("?", (Image.new("RGB", size),))])["input_ids"]
    assert layout.tokens == tokens == int((ids == llava_next.model.config.image_token_id).sum())
    assert len(layout.views) == 1
    assert layout.newlines == tokens - 100
