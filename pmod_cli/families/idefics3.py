"""Idefics3 and the first SmolVLM: as SmolVLM2, without videos."""

from __future__ import annotations

from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Model, Idefics3Processor

from pmod_cli.modeling.decoders import PmodLlamaModel
from pmod_cli.modeling.family import family_classes

CLASSES = family_classes(
    __name__, Idefics3Config, Idefics3Model, Idefics3ForConditionalGeneration, decoders=(PmodLlamaModel,)
)
(
    PmodIdefics3Config,
    PmodIdefics3Model,
    PmodIdefics3ForConditionalGeneration,
    PmodIdefics3CausalLMOutputWithPast,
) = CLASSES
CLASSES.register(Idefics3Processor)
