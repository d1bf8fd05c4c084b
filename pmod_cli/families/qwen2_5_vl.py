"""Qwen2.5-VL: Qwen2-VL with window attention in the vision tower."""

from __future__ import annotations

from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
    Qwen2_5_VLProcessor,
    Qwen2_5_VLTextModel,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer

from pmod_cli.modeling.decoders import mod_decoder
from pmod_cli.modeling.family import family_classes

PmodQwen2_5_VLTextModel = mod_decoder(Qwen2_5_VLTextModel, Qwen2_5_VLDecoderLayer, __name__)
CLASSES = family_classes(
    __name__,
    Qwen2_5_VLConfig,
    Qwen2_5_VLModel,
    Qwen2_5_VLForConditionalGeneration,
    decoders=(PmodQwen2_5_VLTextModel,),
)
(
    PmodQwen2_5_VLConfig,
    PmodQwen2_5_VLModel,
    PmodQwen2_5_VLForConditionalGeneration,
    PmodQwen2_5_VLCausalLMOutputWithPast,
) = CLASSES
CLASSES.register(Qwen2_5_VLProcessor)
