"""Small random models of every family and decoder, and prompts for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
)

from pmod_cli.families.llava import PmodLlavaConfig, PmodLlavaForConditionalGeneration
from pmod_cli.families.llava_next import PmodLlavaNextConfig, PmodLlavaNextForConditionalGeneration
from pmod_cli.modeling.schedule import shifted_cosine
from pmod_cli.modeling.settings import MoDConfig

IMAGE = 99
"""Id of the image token."""

TEXT_CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}


def tiny_config(family: str = "llava", decoder: str = "llama", mod: Any = "cosine", **text: Any) -> Any:
    """A configuration with 8 decoder layers and 25 vision tokens a tile."""
    text_config = TEXT_CONFIGS[decoder](
        **{
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 100,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **({"sliding_window": None} if decoder == "mistral" else {}),
            **text,
        }
    )
    vision_config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=20,
        patch_size=4,
    )
    if mod == "cosine":
        mod = MoDConfig(shifted_cosine(text_config.num_hidden_layers))
    shared: dict[str, Any] = {
        "text_config": text_config,
        "vision_config": vision_config,
        "image_token_index": IMAGE,
        "mod": None if mod is None else mod.to_dict(),
    }
    if family == "llava":
        return PmodLlavaConfig(image_seq_length=25, **shared)
    return PmodLlavaNextConfig(image_grid_pinpoints=[[20, 40], [40, 20], [40, 40]], **shared)


def tiny_model(
    family: str = "llava", decoder: str = "llama", mod: Any = "cosine", seed: int = 0, **text: Any
) -> Any:
    """A random model whose routers are random too, fp32, in evaluation mode."""
    torch.manual_seed(seed)
    config = tiny_config(family, decoder, mod, **text)
    cls: Any = (
        PmodLlavaForConditionalGeneration if family == "llava" else PmodLlavaNextForConditionalGeneration
    )
    model = cls(config).eval()
    for name, parameter in model.named_parameters():
        if "router.weight" in name:
            torch.nn.init.normal_(parameter, std=0.5)
        elif parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)  # large enough for logits that differ
    return model


def dense_counterpart(model: Any) -> Any:
    """The dense transformers model with the same weights, routers left out."""
    is_next = "next" in model.config.model_type
    cls: Any = LlavaNextForConditionalGeneration if is_next else LlavaForConditionalGeneration
    data = model.config.to_dict()
    data.pop("mod")
    data.pop("model_type")
    dense = cls(cls.config_class.from_dict(data))
    weights = {name: value for name, value in model.state_dict().items() if ".router." not in name}
    dense.load_state_dict(weights)
    return dense.eval()


def prompt(images: int, words: int, seed: int = 0, tokens: int = 25) -> list[int]:
    """A prompt of ``words`` random ids with ``images`` images of ``tokens`` vision tokens between them."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, 90, (words,), generator=generator).tolist()
    ids = [1]
    for index in range(images):
        ids += text[index : index + 1] + [IMAGE] * tokens
    return ids + text[images:]


def pad(prompts: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
    """Ids and attention mask of prompts of different lengths."""
    longest = max(map(len, prompts))
    fill = [[0] * (longest - len(ids)) for ids in prompts]
    join = (lambda ids, zeros: zeros + ids) if side == "left" else (lambda ids, zeros: ids + zeros)
    ids = [join(ids, zeros) for ids, zeros in zip(prompts, fill, strict=True)]
    mask = [join([1] * len(ids), zeros) for ids, zeros in zip(prompts, fill, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


def pictures(count: int, seed: int = 0) -> Tensor:
    """Random pixel values, [count, 3, 20, 20]."""
    return torch.randn(count, 3, 20, 20, generator=torch.Generator().manual_seed(seed))


def enable_checkpointing(model: Any, reentrant: bool = False) -> None:
    """Activation checkpointing, by the method's name in every version: transformers 5.24 renamed it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
