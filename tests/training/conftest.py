"""The demo's shipped checkpoint, a p-MoD copy of it, and a little data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pmod_cli.modeling.settings import MoDConfig

NEXT_PINPOINTS = [[80, 160], [160, 80], [160, 160], [240, 80], [80, 240], [240, 240]]


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
