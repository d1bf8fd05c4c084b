"""LLaVA-1.5: one image, one tile, a fixed number of vision tokens."""

from __future__ import annotations

from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaModel, LlavaProcessor

from pmod_cli.families.image_processors import PmodLlavaImageProcessor
from pmod_cli.modeling.decoders import PmodLlamaModel, PmodMistralModel, PmodQwen2Model
from pmod_cli.modeling.family import family_classes

CLASSES = family_classes(
    __name__,
    LlavaConfig,
    LlavaModel,
    LlavaForConditionalGeneration,
    decoders=(PmodLlamaModel, PmodMistralModel, PmodQwen2Model),
)
PmodLlavaConfig, PmodLlavaModel, PmodLlavaForConditionalGeneration, PmodLlavaCausalLMOutputWithPast = CLASSES
CLASSES.register(LlavaProcessor, PmodLlavaImageProcessor)
