"""LLaVA-OneVision: a base tile and tiles for an image, one tile for each of several images, pooled frames for a video.

Its decoder is Qwen2, its vision tower SigLIP. The tokens of videos are vision tokens and routed like an image's.
"""

from __future__ import annotations

from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionModel,
    LlavaOnevisionProcessor,
)

from pmod_cli.families.tiles import TiledVision
from pmod_cli.modeling.decoders import PmodQwen2Model
from pmod_cli.modeling.family import family_classes

CLASSES = family_classes(
    __name__,
    LlavaOnevisionConfig,
    LlavaOnevisionModel,
    LlavaOnevisionForConditionalGeneration,
    decoders=(PmodQwen2Model,),
    vision=TiledVision,
)
(
    PmodLlavaOnevisionConfig,
    PmodLlavaOnevisionModel,
    PmodLlavaOnevisionForConditionalGeneration,
    PmodLlavaOnevisionCausalLMOutputWithPast,
) = CLASSES
CLASSES.register(LlavaOnevisionProcessor)
