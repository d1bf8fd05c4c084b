"""LLaVA-NeXT (1.6): a base tile and a grid of high-resolution tiles for each image (anyres)."""

from __future__ import annotations

from typing import Any

from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextModel,
    LlavaNextProcessor,
)
from transformers.models.llava_next.modeling_llava_next import LlavaNextModelOutputWithPast

from pmod_cli.modeling.model import (
    MoDConfigMixin,
    MoDForConditionalGeneration,
    MoDMultimodalModel,
    with_routing,
)
from pmod_cli.modeling.registration import register_classes


class PmodLlavaNextConfig(MoDConfigMixin, LlavaNextConfig):
    """`LlavaNextConfig` with a ``mod`` section (see `MoDConfig`)."""

    model_type = "pmod_llava_next"
    mod: dict[str, Any] | None = None


class PmodLlavaNextModel(MoDMultimodalModel, LlavaNextModel):
    """`LlavaNextModel` whose decoder has Mixture-of-Depths layers."""

    config_class = PmodLlavaNextConfig
    output_class = LlavaNextModelOutputWithPast


class PmodLlavaNextForConditionalGeneration(MoDForConditionalGeneration, LlavaNextForConditionalGeneration):
    """`LlavaNextForConditionalGeneration` whose decoder has Mixture-of-Depths layers."""

    config_class = PmodLlavaNextConfig
    inner_class = PmodLlavaNextModel
    forward = with_routing(LlavaNextForConditionalGeneration.forward)


def register() -> None:
    """Register with transformers."""
    register_classes(
        PmodLlavaNextConfig, PmodLlavaNextModel, PmodLlavaNextForConditionalGeneration, LlavaNextProcessor
    )
