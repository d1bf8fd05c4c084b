"""LLaVA-NeXT's tiles and feature maps as the release makes them, and transformers' where it is not asked to."""

from __future__ import annotations

import inspect
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models
from transformers import LlavaNextProcessor, PreTrainedTokenizerFast
from transformers.image_processing_utils import select_best_resolution

from pmod_cli.families.anyres import high_resolution_size, unpadded_box
from pmod_cli.families.image_processors import PmodLlavaNextImageProcessor
from pmod_cli.families.llava_next import PmodLlavaNextConfig, PmodLlavaNextModel, PmodLlavaNextProcessor
from tests.common.reference import REFERENCE
from tests.common.tiny import tiny_model

TABLE = json.loads((REFERENCE / "anyres_table.json").read_text())
ROWS = TABLE["rows"]
SIDE = 24

# Of the sizes at which the release and transformers give another number of tokens: (width, height).
DISPUTED = [(704, 396), (748, 352), (396, 704), (176, 110), (328, 205)]


def pinpoints(grids):
    """(height, width), in the recorded order, which is (width, height)."""
    return [[down * 336, across * 336] for across, down in TABLE["grids"][grids]]


@pytest.fixture(scope="module")
def processor():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "<image>": 1}, unk_token="<unk>")),
        additional_special_tokens=["<image>"],
    )
    size = {"height": 336, "width": 336}
    images = PmodLlavaNextImageProcessor(
        size={"shortest_edge": 336}, crop_size=size, image_grid_pinpoints=pinpoints("next4")
    )
    return PmodLlavaNextProcessor(
        images, tokenizer, 14, "default", num_additional_image_tokens=1, released_anyres=True
    )


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['grids']}-{row['image_wh']}")
def test_recorded_sizes(row):
    width, height = row["image_wh"]
    best = select_best_resolution((height, width), pinpoints(row["grids"]))
    assert list(best) == row["best_resolution_wh"][::-1]
    grid = (row["grid_wh"][1], row["grid_wh"][0])
    size = high_resolution_size((height, width), grid, SIDE)
    assert list(size) == row["unpadded_feature_hw"]
    if row["first_kept_row_col"]:
        top, _, left, _ = unpadded_box((height, width), (grid[0] * SIDE, grid[1] * SIDE))
        assert [top, left] == row["first_kept_row_col"]
    for limit in (2, 4):
        recorded = row[f"max_num_patches_{limit}"]
        assert list(high_resolution_size((height, width), grid, SIDE, limit)) == recorded["hw"]


def test_processor_counts_as_recorded(processor):
    for row in ROWS:
        processor.image_processor.image_grid_pinpoints = pinpoints(row["grids"])
        sizes = [row["image_wh"][::-1]]
        for limit, recorded in ((None, row), (2, row["max_num_patches_2"]), (4, row["max_num_patches_4"])):
            processor.max_num_patches = limit
            counted = processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"]
            assert counted == [recorded["vision_tokens_total"]], row
    processor.max_num_patches = None
    processor.image_processor.image_grid_pinpoints = pinpoints("next4")


def test_recorded_borders_of_the_picture(processor):
    """A white picture on the black canvas shows where each row of pixels went."""
    for row in ROWS[:8]:
        image = Image.new("RGB", tuple(row["image_wh"]), "white")
        tiles = processor.image_processor(image, return_tensors="np")["pixel_values"][0][1:]
        across, down = row["grid_wh"]
        canvas = (
            tiles.reshape(down, across, 3, 336, 336)
            .transpose(0, 3, 1, 4, 2)
            .reshape(down * 336, across * 336, 3)
        )
        rows, columns = (np.flatnonzero((canvas[..., 0] > 0).any(axis)) for axis in (1, 0))
        box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        assert box == row["pixel_bbox_after_resize_and_pad"]


@pytest.fixture(scope="module")
def packer():
    """A model of the real tile geometry, of which only the packing of features is used."""
    config = PmodLlavaNextConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "image_size": 336,
            "patch_size": 14,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,
            "vocab_size": 16,
        },
        image_grid_pinpoints=pinpoints("next4"),
        released_anyres=True,
    )
    return PmodLlavaNextModel(config)


def pack(model, width, height):
    down, across = (
        side // 336 for side in select_best_resolution((height, width), model.config.image_grid_pinpoints)
    )
    tiles = torch.randn(1 + down * across, SIDE * SIDE, 8, generator=torch.Generator().manual_seed(width))
    with torch.no_grad():
        packed, lengths = model.pack_image_features(
            [tiles], torch.tensor([[height, width]]), "default", image_newline=model.image_newline
        )
    assert lengths.tolist() == [len(packed[0])]
    return packed[0]


def as_released(model, released, limit=None):
    model.config.released_anyres, model.config.max_num_patches = released, limit
    return model


@pytest.mark.parametrize(("width", "height"), DISPUTED)
def test_disputed_sizes(processor, packer, width, height):
    tokens = pack(as_released(packer, True), width, height)
    assert processor._get_number_of_features(height, width, 336, 336) - 1 == len(tokens)
    dense = LlavaNextProcessor(
        processor.image_processor, processor.tokenizer, 14, "default", num_additional_image_tokens=1
    )
    counted = dense._get_number_of_features(height, width, 336, 336) - 1
    # The ordinary checkpoint's processor and model, ours included, keep transformers' rule.
    assert len(pack(as_released(packer, False), width, height)) == counted != len(tokens)


@given(width=st.integers(1, 2048), height=st.integers(1, 2048))
def test_model_and_processor_agree(processor, packer, width, height):
    tokens = pack(as_released(packer, True), width, height)
    assert processor._get_number_of_features(height, width, 336, 336) - 1 == len(tokens)
    ordinary = pack(as_released(packer, False), width, height)
    if len(ordinary) == len(tokens):
        assert torch.equal(ordinary, tokens)


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row["grids"] == "next4"][:6], ids=lambda r: str(r["image_wh"])
)
def test_large_maps_are_shrunk(packer, row):
    tokens = pack(as_released(packer, True, 2), *row["image_wh"])
    assert len(tokens) == row["max_num_patches_2"]["vision_tokens_total"]


def test_an_ordinary_config_says_nothing_of_the_release():
    assert PmodLlavaNextConfig().released_anyres is False
    assert inspect.signature(PmodLlavaNextProcessor).parameters["released_anyres"].default is False


def test_settings_survive_saving(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    from transformers import AutoProcessor

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "pmod_llava_next"}))
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is PmodLlavaNextProcessor
    assert type(again.image_processor) is PmodLlavaNextImageProcessor
    assert again.released_anyres is True
    assert again.num_additional_image_tokens == 1


def test_a_flat_picture_without_high_resolution_tokens_is_not_routed():
    from pmod_cli.modeling.settings import MoDConfig

    model = tiny_model("llava_next", mod=MoDConfig([None, 0.5] * 4, target_tokens="vision_hr"))
    model.config.released_anyres = model.model.config.released_anyres = True
    model.config.image_grid_pinpoints = model.model.config.image_grid_pinpoints = [[40, 80]]
    ids = torch.tensor([[1, *[99] * 25, 5, 6]])
    inputs = {"pixel_values": torch.randn(1, 9, 3, 20, 20), "image_sizes": torch.tensor([[2, 400]])}
    with torch.no_grad():
        routing = model(input_ids=ids, **inputs, output_routing=True).routing
    assert routing == (None,) * 8
