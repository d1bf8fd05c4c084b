"""Qwen3-VL (dense): DeepStack adds features of the vision tower after each of the first decoder layers."""

from __future__ import annotations

from transformers import (
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    Qwen3VLProcessor,
    Qwen3VLTextModel,
)
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextDecoderLayer

from pmod_cli.modeling.decoders import mod_decoder
from pmod_cli.modeling.family import family_classes

PmodQwen3VLTextModel = mod_decoder(Qwen3VLTextModel, Qwen3VLTextDecoderLayer, __name__)
CLASSES = family_classes(
    __name__, Qwen3VLConfig, Qwen3VLModel, Qwen3VLForConditionalGeneration, decoders=(PmodQwen3VLTextModel,)
)
(
    PmodQwen3VLConfig,
    PmodQwen3VLModel,
    PmodQwen3VLForConditionalGeneration,
    PmodQwen3VLCausalLMOutputWithPast,
) = CLASSES
CLASSES.register(Qwen3VLProcessor)
