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
        projector: Ends of the names of the projector's weights.
    """

    name: str
    base_type: str
    architecture: str
    decoders: tuple[str, ...]
    videos: bool = False
    layer_prefixes: tuple[str, ...] = ("model.language_model.layers.", "language_model.model.layers.")
    projector: tuple[str, ...] = (
        "multi_modal_projector.linear_1.weight",
        "multi_modal_projector.linear_2.weight",
    )

    @property
    def model_type(self) -> str:
        """``model_type`` of the p-MoD model."""
        return f"pmod_{self.base_type}"


def _qwen(
    name: str, classes: str, projector: tuple[str, ...] = ("merger.mlp.0.weight", "merger.mlp.2.weight")
) -> Family:
    # In the first checkpoints the vision tower (`visual.*`) stands beside the language model (`model.*`).
    prefixes = ("model.language_model.layers.", "model.layers.")
    return Family(
        name, name, f"Pmod{classes}ForConditionalGeneration", (f"{name}_text",), True, prefixes, projector
    )


def _idefics(name: str, classes: str) -> Family:
    prefixes, projector = ("model.text_model.layers.",), ("connector.modality_projection.proj.weight",)
    return Family(name, name, f"Pmod{classes}ForConditionalGeneration", ("llama",), False, prefixes, projector)


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
    _qwen("qwen2_vl", "Qwen2VL"),
    _qwen("qwen2_5_vl", "Qwen2_5_VL"),
    _qwen("qwen3_vl", "Qwen3VL", ("merger.linear_fc1.weight", "merger.linear_fc2.weight")),
    Family("internvl", "internvl", "PmodInternVLForConditionalGeneration", ("qwen2", "qwen3", "llama")),
    _idefics("smolvlm", "SmolVLM"),
    _idefics("idefics3", "Idefics3"),
)

_LINEAR = "some of its decoder layers have linear attention, whose state cannot leave tokens out"
_BOTH_WAYS = "its decoder's tokens of a picture see one another both ways, and a p-MoD layer's mask is causal"
_FOUR_NORMS = "its decoder layers have four norms, two of them behind the branches that p-MoD weighs"
_POST_NORM = "its decoder layers have their norms behind the branches (post-norm), which p-MoD weighs"
REFUSED = {
    "qwen3_5": _LINEAR,
    "qwen3_5_moe": _LINEAR,
    "qwen3_next": _LINEAR,
    "gemma3": f"{_BOTH_WAYS}; {_FOUR_NORMS}",
    "gemma3n": _FOUR_NORMS,
    "gemma4": _FOUR_NORMS,
    "glm4v": _FOUR_NORMS,
    "paligemma": _BOTH_WAYS,
    "olmo2": _POST_NORM,
    "olmo3": _POST_NORM,
}
"""Model types, of whole models or of their decoders, that p-MoD does not fit, and why."""


def text_part(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a ``config.json``, in which older Qwen models have it among the rest."""
    if config.get("text_config") or "hidden_size" not in config:
        return dict(config.get("text_config") or {})
    return {key: value for key, value in config.items() if key != "model_type"}


def dense_first(config: dict[str, Any]) -> int:
    """How many of the first decoder layers stay dense, whatever the schedule.

    After each of them features of the vision tower are added to its tokens (DeepStack): all tokens are needed there.
    """
    return len((config.get("vision_config") or {}).get("deepstack_visual_indexes") or ())


def find_family(model_type: str) -> Family:
    """The family of a dense or p-MoD ``model_type``; a `PmodError` names those that exist."""
    for family in FAMILIES:
        if model_type in (family.base_type, family.model_type):
            return family
    if model_type in REFUSED:
        raise PmodError(f"{model_type} cannot become p-MoD: {REFUSED[model_type]}")
    supported = ", ".join(family.base_type for family in FAMILIES)
    raise PmodError(f"model type {model_type!r} is not supported", f"supported: {supported}")


def check_decoder(family: Family, config: dict[str, Any]) -> None:
    """Refuse a language model that cannot become p-MoD: of another architecture, or with a sliding window."""
    text = text_part(config)
    kind = text.get("model_type", family.decoders[0])
    if kind in REFUSED:
        raise PmodError(f"language model {kind!r} cannot become p-MoD: {REFUSED[kind]}")
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


class _Registered(dict[Any, Any]):
    """What was registered with one of transformers' Auto mappings, families that wait for their first use included.

    A family's module registers its classes when it is imported: here, as soon as transformers asks for its model type,
    or looks through the names of all registered classes.
    """

    def __contains__(self, key: object) -> bool:
        if isinstance(key, str) and not super().__contains__(key):
            load_families(key)
        return super().__contains__(key)

    def values(self) -> Any:
        """All families' too."""
        load_families()
        return super().values()


def register_lazily(auto_module: Any) -> None:
    """Let an Auto module of transformers find the p-MoD families; none is imported before it is asked for."""
    for name in ("CONFIG_MAPPING", "PROCESSOR_MAPPING", "IMAGE_PROCESSOR_MAPPING"):
        mapping = getattr(auto_module, name, None)
        if mapping is not None and not isinstance(mapping._extra_content, _Registered):
            mapping._extra_content = _Registered(mapping._extra_content)


def load_families(model_type: str | None = None) -> None:
    """Import the family of a p-MoD ``model_type``, if it is one, or all families: their classes are then registered."""
    for family in FAMILIES:
        if model_type in (None, family.model_type):
            importlib.import_module(f"pmod_cli.families.{family.name}")
