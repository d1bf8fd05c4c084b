"""LLaVA-1.5: one image, one tile, a fixed number of vision tokens."""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaProcessor,
)
from transformers.models.llava.modeling_llava import LlavaModelOutputWithPast

from pmod_cli.modeling.model import (
    MoDConfigMixin,
    MoDForConditionalGeneration,
    MoDMultimodalModel,
    with_routing,
)


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
    """Register with the Auto classes."""
    AutoConfig.register("pmod_llava", PmodLlavaConfig, exist_ok=True)
    AutoModel.register(PmodLlavaConfig, PmodLlavaModel, exist_ok=True)
    AutoModelForImageTextToText.register(PmodLlavaConfig, PmodLlavaForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(PmodLlavaConfig, LlavaProcessor, exist_ok=True)
