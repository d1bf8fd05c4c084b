"""A small random LLaVA-OneVision: 9 features a tile, 4 a frame, at most two tiles of high resolution."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerFast,
)

from pmod_cli.families.llava_onevision import (
    PmodLlavaOnevisionConfig,
    PmodLlavaOnevisionForConditionalGeneration,
)
from pmod_cli.modeling.schedule import shifted_cosine
from pmod_cli.modeling.settings import MoDConfig

IMAGE, VIDEO, SIDE, LAYERS = 60, 61, 13, 6
GRIDS = [[SIDE * down, SIDE * across] for down in (1, 2, 3) for across in (1, 2, 3)]
TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}"
    "{{ c.get('text', '<' + c['type'] + '>') }}{% endfor %}{% endfor %}"
)


def raw_config() -> dict[str, Any]:
    """config.json of the dense model."""
    return {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "model_type": "llava_onevision",
        "image_token_index": IMAGE,
        "video_token_index": VIDEO,
        "image_grid_pinpoints": GRIDS,
        "vision_aspect_ratio": "anyres_max_2",
        "text_config": {
            "model_type": "qwen2",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 64,
            "max_position_embeddings": 1024,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "patch_size": 4,
            "image_size": SIDE,
            "vision_use_head": False,
        },
    }


def dense_model() -> Any:
    """The transformers class with random weights."""
    torch.manual_seed(0)
    model = LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig.from_dict(raw_config())).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)  # large enough for logits that differ
    return model


def pmod_model(mod: MoDConfig | None = None) -> Any:
    """The p-MoD model of the same weights, its routers random."""
    mod = mod or MoDConfig(shifted_cosine(LAYERS))
    raw = raw_config() | {"model_type": "pmod_llava_onevision", "mod": mod.to_dict()}
    model = PmodLlavaOnevisionForConditionalGeneration(PmodLlavaOnevisionConfig.from_dict(raw)).eval()
    model.load_state_dict(dense_model().state_dict(), strict=False)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".router." in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def processor() -> LlavaOnevisionProcessor:
    """The real processor, with a tokenizer of one token a word."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{number}": number for number in range(4, 60)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(words | {"<image>": IMAGE, "<video>": VIDEO}),
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        additional_special_tokens=["<image>", "<video>"],
    )
    size = {"height": SIDE, "width": SIDE}
    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=GRIDS),
        tokenizer,
        LlavaOnevisionVideoProcessor(size=size, do_sample_frames=False),
        num_image_tokens=9,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
        vision_aspect_ratio="anyres_max_2",
    )


def _tokenizer(words: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def video(frames: int, seed: int = 0) -> np.ndarray:
    """Frames of noise, [frames, height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 255, (frames, 20, 30, 3)).astype(np.uint8)
