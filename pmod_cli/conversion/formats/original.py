"""The original LLaVA format (``liuhaotian/llava-*``): a dense model in the names of LLaVA's own code."""

from __future__ import annotations

from pmod_cli.checkpoints.load import ORIGINAL_DECODERS, is_original
from pmod_cli.checkpoints.source import Source
from pmod_cli.conversion.formats import Options, Translation
from pmod_cli.conversion.formats.llava_checkpoint import translate_llava

SUMMARY = "the original LLaVA format (llava_llama, llava_mistral, llava_qwen)"


def matches(source: Source) -> bool:
    """Whether ``model_type`` is one of the original code's; its first release called it ``llava``, as transformers."""
    return is_original(source.config)


def translate(source: Source, options: Options) -> Translation:
    """Rename the weights.

    Raises:
        PmodError: See `translate_llava`.
    """
    return translate_llava(source, options, ORIGINAL_DECODERS.get(source.model_type, "llama"))
