"""Model families: one file per family, one line here.

A family is a transformers image-text-to-text model and its p-MoD counterpart. This registry is light (no torch),
so that conversion and profiling can read it; the classes live in the family's own module.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from pmod_cli.output.errors import PmodError


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        name: How recipes and messages call it.
        base_type: ``model_type`` of the dense transformers model.
        architecture: Class name of the p-MoD model.
        decoders: ``model_type`` of the supported language models; the first is transformers' default.
        videos: Whether it takes videos.
        layer_prefixes: What may stand before a decoder layer's number in a checkpoint's parameter names.
    """

    name: str
    base_type: str
    architecture: str
    decoders: tuple[str, ...]
    videos: bool = False
    layer_prefixes: tuple[str, ...] = ("model.language_model.layers.", "language_model.model.layers.")

    @property
    def model_type(self) -> str:
        """``model_type`` of the p-MoD model."""
        return f"pmod_{self.base_type}"


FAMILIES = (
    Family("llava", "llava", "PmodLlavaForConditionalGeneration", ("llama", "mistral", "qwen2")),
    Family(
        "llava_next", "llava_next", "PmodLlavaNextForConditionalGeneration", ("llama", "mistral", "qwen2")
    ),
    Family(
        "llava_onevision",
        "llava_onevision",
        "PmodLlavaOnevisionForConditionalGeneration",
        ("qwen2",),
        videos=True,
    ),
)


def find_family(model_type: str) -> Family:
    """The family of a dense or p-MoD ``model_type``; a `PmodError` names those that exist."""
    for family in FAMILIES:
        if model_type in (family.base_type, family.model_type):
            return family
    supported = ", ".join(family.base_type for family in FAMILIES)
    raise PmodError(f"model type {model_type!r} is not supported", f"supported: {supported}")


def check_decoder(family: Family, config: dict[str, Any]) -> None:
    """Refuse a language model that cannot become p-MoD: of another architecture, or with a sliding window."""
    text = config.get("text_config") or {}
    kind = text.get("model_type", family.decoders[0])
    if kind not in family.decoders:
        raise PmodError(
            f"language model {kind!r} is not supported in {family.name}",
            f"supported: {', '.join(family.decoders)}",
        )
    # What transformers takes where the config is silent.
    window = text.get("sliding_window", 4096 if kind == "mistral" else None)
    if window and text.get("use_sliding_window", kind == "mistral"):
        raise PmodError(
            f"the language model's attention has a sliding window of {window} tokens, which is not supported",
            "a window counts tokens, and p-MoD layers drop some; sliding_window: null in config.json ends it",
        )


def register_auto_classes() -> None:
    """Tell transformers' Auto classes about every p-MoD family (this imports torch)."""
    for family in FAMILIES:
        importlib.import_module(f"pmod_cli.families.{family.name}").register()
