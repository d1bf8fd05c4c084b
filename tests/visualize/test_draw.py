"""The pictures show what the routers did: pixels of kept and of dimmed patches."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from pmod_cli import plots
from pmod_cli.prompts import Prompt
from pmod_cli.visualize import draw
from pmod_cli.visualize.trace import trace
from tests.common import visual_models

CASES = [
    ("llava", (96, 96)),
    ("llava", (160, 70)),
    ("llava_next", (150, 90)),
    ("llava_next", (70, 230)),
    ("onevision", (150, 120)),
]


@pytest.fixture(scope="module", params=CASES, ids=[f"{family}-{w}x{h}" for family, (w, h) in CASES])
def case(request):
    family, size = request.param
    loaded = request.getfixturevalue(family)
    image = visual_models.noise(*size)
    prompt = Prompt(" w5 w6", (image,))
    return loaded, image, prompt, trace(loaded, prompt)


def routing_of(loaded, prompt):
    """Kept positions among the vision tokens by layer, straight from ``output_routing``'s indices."""
    inputs = loaded.encode([prompt])
    with torch.inference_mode():
        routing = loaded.model(**inputs, output_routing=True).routing
    vision = (inputs["input_ids"][0] == loaded.model.config.image_token_id).nonzero().flatten().tolist()
    place = {position: index for index, position in enumerate(vision)}
    return [
        None if layer is None else {place[i] for i in layer.indices[0].tolist() if i in place}
        for layer in routing
    ]


def visible(layout, view):
    """Row, column and centre on the original of every patch that shows something (more than a pixel)."""
    for row in range(view.rows):
        for column in range(view.columns):
            left, right = view.x[column : column + 2]
            top, bottom = view.y[row : row + 2]
            if right - left > 1 and bottom - top > 1:
                yield row, column, (left + right) / 2 / layout.width, (top + bottom) / 2 / layout.height


def test_trace_is_the_routing(case):
    loaded, _, prompt, traced = case
    routing = routing_of(loaded, prompt)
    for layer, kept in enumerate(routing):
        every = set(range(traced.layout.tokens))
        assert set(traced.kept[layer].nonzero()[0]) == (every if kept is None else kept)
        assert np.isnan(traced.weights[layer]).all() == (kept is None)
    assert traced.survived.max() <= traced.layers


def test_sheet_shows_kept_patches(case, tmp_path):
    """In the file that is written: a kept patch has the picture's colour, a dropped one is mixed with grey."""
    loaded, image, prompt, traced = case
    layers = draw.default_layers(traced, most=3)
    assert len(layers) == 3
    figure = draw.draw_sheet(traced, image, layers, "heading")
    plots.save(figure, tmp_path / "sheet.png", dpi=200)
    written = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"), dtype=float) / 255
    panels = {axis.get_gid(): axis for axis in figure.axes if axis.get_gid()}
    assert set(panels) == {"picture"} | {
        name
        for number in range(len(traced.layout.views))
        for name in (*(f"layer-{layer}-{number}" for layer in layers), f"heat-{number}")
    }

    def pixel(name, x, y):
        axis = panels[name]
        # Panels keep the picture's aspect ratio, so their box is where the picture is.
        box = axis.get_position()
        column = (box.x0 + x * box.width) * written.shape[1]
        row = (1 - box.y1 + y * box.height) * written.shape[0]
        return written[int(row), int(column)]

    routing = routing_of(loaded, prompt)
    compared = 0
    for number, view in enumerate(traced.layout.views):
        for layer in layers:
            drawn, wanted = set(), set()
            for row, column, x, y in visible(traced.layout, view):
                token = int(view.tokens[row, column])
                original, seen = pixel("picture", x, y), pixel(f"layer-{layer}-{number}", x, y)
                dimmed = (1 - plots.DIM_SHARE) * original + plots.DIM_SHARE * plots.DIM
                if np.abs(original - dimmed).max() < 0.1:
                    continue  # a grey patch: cannot be told
                if np.abs(seen - original).max() < np.abs(seen - dimmed).max():
                    drawn.add(token)
                if token in routing[layer]:
                    wanted.add(token)
            assert drawn == wanted
            compared += len(wanted)
    assert compared > 8


def test_heat_map_counts_layers(case):
    _, image, _, traced = case
    figure = draw.draw_sheet(traced, image, [2], "heading")
    for number, view in enumerate(traced.layout.views):
        [axis] = [axis for axis in figure.axes if axis.get_gid() == f"heat-{number}"]
        counts = axis.images[0].get_array()
        for row, column, x, y in visible(traced.layout, view):
            shown = counts[int(y * counts.shape[0]), int(x * counts.shape[1])]
            assert shown == traced.kept[:, view.tokens[row, column]].sum()


def test_animation_has_a_frame_a_layer(case):
    _, image, _, traced = case
    animation = Image.open(io.BytesIO(draw.draw_animation(traced, image)))
    assert animation.n_frames == traced.layers
    frames = []
    for index in (0, *draw.default_layers(traced, most=3)):
        animation.seek(index)
        frames.append(np.asarray(animation.convert("L"), dtype=float))
    # The later the layer, the more of the picture is the grey of dropped patches.
    grey = [float((np.abs(frame - 255 * plots.DIM) < 40).mean()) for frame in frames]
    assert grey[0] < grey[1] < grey[2] <= grey[3] + 0.05


def test_what_no_patch_shows_is_grey(llava):
    """A centre crop never shows the ends of a wide picture."""
    crop = type(llava.processor.image_processor)(
        **llava.processor.image_processor.to_dict() | {"do_pad": False}
    )
    from pmod_cli.visualize.layout import lay_out

    layout = lay_out(llava.model, crop, (200, 100))
    white = np.ones((100, 200, 3))
    seen = draw.dim_dropped(white, layout, layout.views[0], np.ones(100, dtype=bool))
    assert seen[50, 100].min() == 1
    assert seen[50, 20].max() < 0.5
    assert seen[50, 180].max() < 0.5


def test_default_layers():
    class Ratios:
        ratios = [None] * 8 + [0.5] * 24

    assert draw.default_layers(Ratios()) == [8, 13, 17, 22, 26, 31]
    Ratios.ratios = [None, 0.5, None, 0.5]
    assert draw.default_layers(Ratios()) == [1, 3]
