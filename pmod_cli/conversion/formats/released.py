"""The paper's released p-MoD format (``pmod_llava_llama``): schedule, router settings and routers come along."""

from __future__ import annotations

from pmod_cli.checkpoints.load import is_released
from pmod_cli.checkpoints.source import Source
from pmod_cli.conversion.formats import Options, Translation
from pmod_cli.conversion.formats.llava_checkpoint import translate_llava
from pmod_cli.conversion.formats.llava_config import mod_config

SUMMARY = "the paper's released p-MoD format (pmod_llava_llama)"


def matches(source: Source) -> bool:
    """Whether ``model_type`` is the release's."""
    return is_released(source.config)


def translate(source: Source, options: Options) -> Translation:
    """Rename the weights; read ratios, weight norm and targets from the config.

    Raises:
        PmodError: A setting that the release does not know, or see `translate_llava`.
    """
    return translate_llava(source, options, "llama", mod_config(source.config))
