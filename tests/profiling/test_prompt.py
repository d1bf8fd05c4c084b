"""Vision tokens and crops of an image are what the real processor and model make of it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profiling_models import geometry

from pmod_cli.errors import PmodError
from pmod_cli.profiling.prompt import Workload, default_image_size, image_tokens, parse_size


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
