"""Small p-MoD models with random routers, LLaVA-1.5 (padding) and LLaVA-NeXT, and pictures to see patches on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoProcessor,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    SiglipVisionConfig,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from pmod_cli.demo.job import BASELINE
from pmod_cli.families.llava import PmodLlavaConfig, PmodLlavaForConditionalGeneration
from pmod_cli.families.llava_next import PmodLlavaNextConfig, PmodLlavaNextForConditionalGeneration
from pmod_cli.generation import VisionLanguageModel
from pmod_cli.modeling.settings import MoDConfig

SIDE, PATCH = 80, 8
PLAIN = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}  # padding is then black
PINPOINTS = [[80, 160], [160, 80], [160, 160], [240, 80], [80, 240]]
MOD = MoDConfig([None, None, 0.8, 0.6, 0.4, 0.2, 0.15, 0.15])


def make(family: str, **options: Any) -> VisionLanguageModel:
    """A model of the demo's geometry whose routers are random."""
    processor = AutoProcessor.from_pretrained(BASELINE, backend="pil")
    square = {"height": SIDE, "width": SIDE}
    plain = AutoConfig.from_pretrained(BASELINE)
    same = ("vision_config", "text_config", "image_token_id", "vision_feature_select_strategy")
    shared = {name: getattr(plain, name) for name in same} | {"mod": MOD.to_dict()}
    torch.manual_seed(0)
    model: Any
    if family == "llava":
        processor.image_processor = LlavaImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size=square, do_pad=True, **PLAIN
        )
        config = PmodLlavaConfig(**shared, vision_feature_layer=plain.vision_feature_layer, **options)
        model = PmodLlavaForConditionalGeneration(config)
    else:
        processor = LlavaNextProcessor(
            LlavaNextImageProcessorPil(
                size={"shortest_edge": SIDE}, crop_size=square, image_grid_pinpoints=PINPOINTS, **PLAIN
            ),
            processor.tokenizer,
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=processor.chat_template,
        )
        next_config = PmodLlavaNextConfig(
            **shared, vision_feature_layer=-1, image_grid_pinpoints=PINPOINTS, **options
        )
        model = PmodLlavaNextForConditionalGeneration(next_config)
    for name, parameter in model.named_parameters():
        if "router.weight" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return VisionLanguageModel(model, processor)


def dense_onevision() -> tuple[Any, Any]:
    """A dense LLaVA-OneVision and its image processor: three patches of 8 pixels leave 2 of a tile's 26 out."""
    side = 26
    grids = [[side * down, side * across] for down in (1, 2, 3) for across in (1, 2, 3)]
    text = AutoConfig.from_pretrained(BASELINE).text_config
    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=side,
        patch_size=8,
        vision_use_head=False,
    )
    config = LlavaOnevisionConfig(
        text_config=text, vision_config=vision, image_grid_pinpoints=grids, vision_aspect_ratio="anyres_max_9"
    )
    size = {"height": side, "width": side}
    images = LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=grids, **PLAIN)
    return LlavaOnevisionForConditionalGeneration(config).eval(), images


def save(loaded: VisionLanguageModel, folder: Path) -> Path:
    """Write it as a checkpoint."""
    loaded.model.save_pretrained(folder)
    loaded.processor.save_pretrained(folder)
    return folder


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Soft coloured noise: every place differs from every other."""
    small = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
