"""SmolVLM2: tiles and a thumbnail, marked by rows and columns; the language model is called ``text_model``."""

from __future__ import annotations

from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMModel, SmolVLMProcessor

from pmod_cli.modeling.decoders import PmodLlamaModel
from pmod_cli.modeling.family import family_classes

CLASSES = family_classes(
    __name__, SmolVLMConfig, SmolVLMModel, SmolVLMForConditionalGeneration, decoders=(PmodLlamaModel,)
)
(
    PmodSmolVLMConfig,
    PmodSmolVLMModel,
    PmodSmolVLMForConditionalGeneration,
    PmodSmolVLMCausalLMOutputWithPast,
) = CLASSES
CLASSES.register(SmolVLMProcessor)
