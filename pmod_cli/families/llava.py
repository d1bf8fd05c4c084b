"""LLaVA-1.5: one image, one tile, a fixed number of vision tokens."""

from __future__ import annotations

from typing import Any

from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaProcessor,
)
from transformers.models.llava.modeling_llava import LlavaModelOutputWithPast

from pmod_cli.families.image_processors import PmodLlavaImageProcessor, register_image_processor
from pmod_cli.modeling.model import (
    MoDConfigMixin,
    MoDForConditionalGeneration,
    MoDMultimodalModel,
    with_routing,
)
from pmod_cli.modeling.registration import register_classes


class PmodLlavaConfig(MoDConfigMixin, LlavaConfig):
    """`LlavaConfig` with a ``mod`` section (see `MoDConfig`)."""

    model_type = "pmod_llava"
    mod: dict[str, Any] | None = None


class PmodLlavaModel(MoDMultimodalModel, LlavaModel):
    """`LlavaModel` whose decoder has Mixture-of-Depths layers."""

    config_class = PmodLlavaConfig
    output_class = LlavaModelOutputWithPast


class PmodLlavaForConditionalGeneration(MoDForConditionalGeneration, LlavaForConditionalGeneration):
    """`LlavaForConditionalGeneration` whose decoder has Mixture-of-Depths layers."""

    config_class = PmodLlavaConfig
    inner_class = PmodLlavaModel
    forward = with_routing(LlavaForConditionalGeneration.forward)


def register() -> None:
    """Register with transformers."""
    register_classes(PmodLlavaConfig, PmodLlavaModel, PmodLlavaForConditionalGeneration, LlavaProcessor)
    register_image_processor(PmodLlavaConfig, PmodLlavaImageProcessor)
