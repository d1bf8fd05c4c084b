"""Vision tokens and crops of an image are what the real processor and model make of it."""

from functools import partial
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmod_cli.families.anyres import high_resolution_size
from pmod_cli.output.errors import PmodError
from pmod_cli.profiling.geometry import Geometry
from pmod_cli.profiling.prompt import Workload, _best_grid, default_image_size, image_tokens, parse_size
from tests.common.profiling_models import geometry, tiny_raw


@settings(max_examples=150, deadline=None)
@given(height=st.integers(20, 3000), width=st.integers(20, 3000))
def test_llava_next_agrees_with_the_processor(height, width):
    from transformers.image_processing_utils import select_best_resolution
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

    shape = geometry("llava-next-7b")
    grids = [list(grid) for grid in shape.pinpoints]
    found = image_tokens(shape, (height, width))
    rows, columns = (side // 336 for side in select_best_resolution((height, width), grids))
    unpadded, newlines = LlavaNextProcessor._get_unpadded_features(None, height, width, 24, 24, rows, columns)
    assert found.tokens == 576 + unpadded + newlines
    assert found.crops == image_size_to_num_patches([height, width], grids, 336)


@settings(max_examples=150, deadline=None)
@given(height=st.integers(20, 4000), width=st.integers(20, 4000))
def test_llava_onevision_agrees_with_the_processor(height, width):
    from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches
    from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

    shape = geometry("llava-onevision-7b")
    grids = [list(grid) for grid in shape.pinpoints]
    processor = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=grids),
        num_image_tokens=729,
        vision_aspect_ratio="anyres_max_9",
    )
    processor._get_unpadded_features = partial(LlavaOnevisionProcessor._get_unpadded_features, processor)
    found = image_tokens(shape, (height, width))
    expected = LlavaOnevisionProcessor._get_number_of_features(processor, height, width, 384, 384)
    assert found.tokens == expected
    assert found.crops == image_size_to_num_patches([height, width], grids, 384)


@pytest.mark.parametrize("limit", [None, 1])
def test_the_releases_rule_where_a_checkpoint_asks_for_it(limit):
    raw = tiny_raw("llava_next")
    released = Geometry.from_config(raw | {"released_anyres": True, "max_num_patches": limit})
    for size in ((29, 30), (40, 100), (333, 20)):
        grid_down, grid_across = (side // 16 for side in _best_grid(size, released.pinpoints))
        rows, columns = high_resolution_size(size, (grid_down, grid_across), 4, limit)
        assert image_tokens(released, size).tokens == 16 + rows * (columns + 1)


def test_largest_image_by_default():
    shape = geometry("llava-next-7b")
    assert default_image_size(shape) == (672, 672)
    assert image_tokens(shape, (672, 672)).tokens == 2928


def test_llava_sees_one_crop_of_any_image():
    assert image_tokens(geometry("llava-1.5-7b"), (1000, 17)).tokens == 576


def test_parse_size_is_width_first():
    assert parse_size("640x480") == (480, 640)


@pytest.mark.parametrize("text", ["640", "0x3", "axb", "-1x4", "3x4x5"])
def test_bad_size(text):
    with pytest.raises(PmodError, match="WIDTHxHEIGHT"):
        parse_size(text)


def test_too_thin():
    with pytest.raises(PmodError, match="too thin"):
        image_tokens(geometry("llava-next-7b"), (1, 5000))


def test_routed_tokens_by_target():
    shape = geometry("llava-next-7b")
    work = Workload(image_tokens(shape, (672, 672)), (672, 672), text_tokens=35)
    assert [work.routed_tokens(target) for target in ("vision", "vision_hr", "all")] == [2928, 2352, 2963]
