"""The demo's shipped checkpoint, a p-MoD copy of it, and a little data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pmod_cli.demo import data
from pmod_cli.demo.run import BASELINE
from pmod_cli.modeling.settings import MoDConfig
from pmod_cli.recipe import Recipe, parse_recipe

NEXT_PINPOINTS = [[80, 160], [160, 80], [160, 160], [240, 80], [80, 240], [240, 240]]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def baseline() -> Path:
    return BASELINE


@pytest.fixture(scope="session")
def processor():
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(BASELINE, backend="pil")


@pytest.fixture(scope="session")
def pmod_start(tmp_path_factory) -> Path:
    """The baseline with routers at zero, through the model classes."""
    from transformers import AutoConfig, AutoProcessor

    from pmod_cli.families.llava import PmodLlavaConfig, PmodLlavaForConditionalGeneration

    section = MoDConfig([None, None, 0.8, 0.6, 0.4, 0.2, 0.15, 0.15])
    plain = AutoConfig.from_pretrained(BASELINE).to_dict()
    config = PmodLlavaConfig(
        **{key: plain[key] for key in plain if key != "model_type"}, mod=section.to_dict()
    )
    model = PmodLlavaForConditionalGeneration.from_pretrained(BASELINE, config=config, dtype=torch.float32)
    folder = tmp_path_factory.mktemp("pmod-start")
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(BASELINE, backend="pil").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory) -> tuple[Path, Path]:
    """24 conversations about pictures, and 8 without, in one file; and the pictures' folder."""
    folder = tmp_path_factory.mktemp("data") / "train"
    path, images = data.write_training_data(folder, 24)
    records = json.loads(path.read_text())
    words = ["circle", "square", "red", "blue", "left", "top", "yes", "no"]
    for index, word in enumerate(words):
        turns = [{"from": "human", "value": f"Say {word}."}, {"from": "gpt", "value": word}]
        records.append({"id": f"text-{index}", "conversations": turns})
    path.write_text(json.dumps(records))
    return path, images


@pytest.fixture
def recipe():
    def make(**train: object) -> Recipe:
        settings = {
            "max_steps": 6,
            "global_batch_size": 4,
            "micro_batch_size": 4,
            "learning_rate": 1e-3,
            "dtype": "float32",
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "save_steps": 2,
            "num_workers": 0,
        }
        return parse_recipe({"name": "test", "train": {**settings, **train}})

    return make


@pytest.fixture(scope="session")
def next_processor(processor):
    """LLaVA-NeXT's, with grids of up to nine tiles."""
    from transformers import LlavaNextImageProcessorPil, LlavaNextProcessor

    square = {"height": 80, "width": 80}
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 80}, crop_size=square, image_grid_pinpoints=NEXT_PINPOINTS
    )
    return LlavaNextProcessor(
        images,
        processor.tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=processor.chat_template,
    )


@pytest.fixture(scope="session")
def next_start(next_processor, baseline, tmp_path_factory) -> Path:
    """A p-MoD LLaVA-NeXT of the demo's size, with random weights."""
    from transformers import AutoConfig, LlavaNextConfig

    from pmod_cli.families.llava_next import PmodLlavaNextConfig, PmodLlavaNextForConditionalGeneration

    plain = AutoConfig.from_pretrained(baseline)
    same = ("vision_config", "text_config", "image_token_id", "vision_feature_select_strategy")
    dense = LlavaNextConfig(
        **{name: getattr(plain, name) for name in same},
        vision_feature_layer=-1,
        image_grid_pinpoints=NEXT_PINPOINTS,
    ).to_dict()
    dense.pop("model_type")
    section = MoDConfig([None, None, 0.8, 0.6, 0.4, 0.2, 0.15, 0.15])
    torch.manual_seed(0)
    model = PmodLlavaNextForConditionalGeneration(PmodLlavaNextConfig(**dense, mod=section.to_dict()))
    folder = tmp_path_factory.mktemp("next-start")
    model.save_pretrained(folder)
    next_processor.save_pretrained(folder)
    return folder
