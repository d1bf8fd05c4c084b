"""Qwen2-VL: pictures and videos in their own resolution, positions in time, height and width (M-RoPE)."""

from __future__ import annotations

from transformers import (
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLModel,
    Qwen2VLProcessor,
    Qwen2VLTextModel,
)
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLDecoderLayer

from pmod_cli.modeling.decoders import mod_decoder
from pmod_cli.modeling.family import family_classes

PmodQwen2VLTextModel = mod_decoder(Qwen2VLTextModel, Qwen2VLDecoderLayer, __name__)
CLASSES = family_classes(
    __name__, Qwen2VLConfig, Qwen2VLModel, Qwen2VLForConditionalGeneration, decoders=(PmodQwen2VLTextModel,)
)
(
    PmodQwen2VLConfig,
    PmodQwen2VLModel,
    PmodQwen2VLForConditionalGeneration,
    PmodQwen2VLCausalLMOutputWithPast,
) = CLASSES
CLASSES.register(Qwen2VLProcessor)
