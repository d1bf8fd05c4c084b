"""The original LLaVA format (``liuhaotian/llava-*``): a dense model in the names of LLaVA's own code."""

from __future__ import annotations

from pmod_cli.checkpoints.source import Source
from pmod_cli.conversion.formats import Options, Translation
from pmod_cli.conversion.formats.llava_checkpoint import translate_llava

SUMMARY = "the original LLaVA format (llava_llama, llava_mistral, llava_qwen)"
_DECODERS = {"llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2", "llava": "llama"}


def matches(source: Source) -> bool:
    """Whether ``model_type`` is one of the original code's; its first release called it ``llava``, as transformers."""
    return source.model_type in _DECODERS and "mm_vision_tower" in source.config


def translate(source: Source, options: Options) -> Translation:
    """Rename the weights.

    Raises:
        PmodError: See `translate_llava`.
    """
    return translate_llava(source, options, _DECODERS.get(source.model_type, "llama"))
