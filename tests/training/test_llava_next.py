"""LLaVA-NeXT: tiles, at most four, and as many tokens as the processor says."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from pmod_cli.families.processing import picture_ids
from pmod_cli.training.finetune import finetune

PINPOINTS = [[80, 160], [160, 80], [160, 160], [240, 80], [80, 240], [240, 240]]


@pytest.mark.parametrize("size", [(80, 80), (100, 40), (33, 200), (300, 240), (77, 155), (500, 100)])
def test_token_numbers_are_the_processors(next_processor, size):
    image = Image.new("RGB", size)
    ids = next_processor(images=image, text="<image>", return_tensors="pt")["input_ids"][0]
    assert len(picture_ids(next_processor, [image.size])[0]) == int(
        (ids == next_processor.image_token_id).sum()
    )


def test_a_run_on_pictures_of_all_shapes(next_start, tmp_path, recipe):
    images = tmp_path / "images"
    images.mkdir()
    turns = [{"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": "red"}]
    records = []
    for index, size in enumerate([(80, 80), (240, 60), (60, 240), (170, 150)]):
        Image.new("RGB", size, "red").save(images / f"{index}.png")
        records.append({"image": f"{index}.png", "conversations": turns})
    records.append({"conversations": [{"from": "human", "value": "Say red."}, turns[1]]})
    data = tmp_path / "data.json"
    data.write_text(json.dumps(records))
    settings = recipe(max_steps=8, image_aspect_ratio="anyres", save_steps=100)
    result = finetune(next_start, data, images, tmp_path / "out", recipe=settings)
    assert result["final_loss"] < result["first_loss"]
    assert {part["part"] for part in result["parts"]} >= {"image newline", "routers"}
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    saved = AutoProcessor.from_pretrained(tmp_path / "out")
    four = [pinpoint for pinpoint in PINPOINTS if pinpoint != [240, 240]]
    assert [list(pinpoint) for pinpoint in model.config.image_grid_pinpoints] == four
    assert [list(pinpoint) for pinpoint in saved.image_processor.image_grid_pinpoints] == four
