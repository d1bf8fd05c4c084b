"""LLaVA-1.5: one image, one tile, a fixed number of vision tokens."""

from __future__ import annotations

from typing import Any

from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaModel, LlavaProcessor

from pmod_cli.families.image_processors import PmodLlavaImageProcessor
from pmod_cli.modeling.decoders import PmodLlamaModel, PmodMistralModel, PmodQwen2Model
from pmod_cli.modeling.family import family_classes
from pmod_cli.modeling.model import MoDMultimodalModel


class SquareVision(MoDMultimodalModel):
    """An inner model whose every picture is one square of tokens."""

    @staticmethod
    def _tokens_across(config: Any) -> int | None:
        vision = config.vision_config
        return int(vision.image_size // vision.patch_size)


CLASSES = family_classes(
    __name__,
    LlavaConfig,
    LlavaModel,
    LlavaForConditionalGeneration,
    decoders=(PmodLlamaModel, PmodMistralModel, PmodQwen2Model),
    vision=SquareVision,
)
PmodLlavaConfig, PmodLlavaModel, PmodLlavaForConditionalGeneration, PmodLlavaCausalLMOutputWithPast = CLASSES
CLASSES.register(LlavaProcessor, PmodLlavaImageProcessor)
