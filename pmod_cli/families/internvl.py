"""InternVL3: tiles and a thumbnail, four patches to a token (pixel shuffle)."""

from __future__ import annotations

from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLModel,
    InternVLProcessor,
    Qwen3Model,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from pmod_cli.modeling.decoders import PmodLlamaModel, PmodQwen2Model, mod_decoder
from pmod_cli.modeling.family import family_classes

PmodQwen3Model = mod_decoder(Qwen3Model, Qwen3DecoderLayer, __name__)
CLASSES = family_classes(
    __name__,
    InternVLConfig,
    InternVLModel,
    InternVLForConditionalGeneration,
    decoders=(PmodQwen2Model, PmodQwen3Model, PmodLlamaModel),
)
(
    PmodInternVLConfig,
    PmodInternVLModel,
    PmodInternVLForConditionalGeneration,
    PmodInternVLCausalLMOutputWithPast,
) = CLASSES
CLASSES.register(InternVLProcessor)
