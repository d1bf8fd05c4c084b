"""Model families: one file per family, one line here.

A family is a transformers image-text-to-text model and its p-MoD counterpart. This registry is light (no torch),
so that conversion and profiling can read it; the classes live in the family's own module.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from pmod_cli.families.defaults import complete
from pmod_cli.output.errors import PmodError


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        name: How recipes and messages call it.
        base_type: ``model_type`` of the dense transformers model.
        architecture: Class name of the p-MoD model.
        decoders: ``model_type`` of the supported language models; the first is transformers' default.
        videos: Whether it takes videos, as far as that is known without its processor.
        layer_prefixes: What may stand before a decoder layer's number in a checkpoint's parameter names.
        projector: Ends of the names of the projector's weights.
        task_name: What lmms-eval's tasks call it where they word a prompt for one model; else they use their default.
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
    task_name: str = "pmod"

    @property
    def model_type(self) -> str:
        """``model_type`` of the p-MoD model."""
        return f"{_OURS}{self.base_type}"

    @property
    def listed(self) -> bool:
        """Whether it stands in `FAMILIES`; of others we know what transformers' classes say, and no more."""
        return bool(self.decoders)

    @property
    def default_decoder(self) -> str:
        """``model_type`` of the language model where a config does not say it; empty if not `listed`."""
        return self.decoders[0] if self.listed else ""


def _qwen(
    name: str, classes: str, projector: tuple[str, ...] = ("merger.mlp.0.weight", "merger.mlp.2.weight")
) -> Family:
    # In the first checkpoints the vision tower (`visual.*`) stands beside the language model (`model.*`).
    prefixes = ("model.language_model.layers.", "model.layers.")
    return Family(
        name,
        name,
        f"Pmod{classes}ForConditionalGeneration",
        (f"{name}_text",),
        True,
        prefixes,
        projector,
        name,
    )


def _idefics(name: str, classes: str, videos: bool = False) -> Family:
    prefixes, projector = ("model.text_model.layers.",), ("connector.modality_projection.proj.weight",)
    return Family(
        name, name, f"Pmod{classes}ForConditionalGeneration", ("llama",), videos, prefixes, projector
    )


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
    Family(
        "internvl",
        "internvl",
        "PmodInternVLForConditionalGeneration",
        ("qwen2", "qwen3", "llama"),
        videos=True,
    ),
    _idefics("smolvlm", "SmolVLM", videos=True),
    _idefics("idefics3", "Idefics3"),
)

_OURS = "pmod_"
_ANYWHERE = (
    "model.language_model.layers.",
    "model.language_model.model.layers.",
    "language_model.model.layers.",
    "model.text_model.layers.",
    "model.layers.",
)
"""Where the layers of a family that is not listed may be."""

_LINEAR = "some of its decoder layers have linear attention, whose state cannot leave tokens out"
_BOTH_WAYS = "its decoder's tokens of a picture see one another both ways, and a p-MoD layer's mask is causal"
_FOUR_NORMS = "its decoder layers have four norms, two of them behind the branches that p-MoD weighs"
_POST_NORM = "its decoder layers have their norms behind the branches (post-norm), which p-MoD weighs"
_POSITIONS = (
    "its attention scales queries by position ids, which flash attention misreads where tokens are left out"
)
REFUSED = {
    "qwen3_5": _LINEAR,
    "qwen3_5_moe": _LINEAR,
    "qwen3_next": _LINEAR,
    "gemma3": f"{_BOTH_WAYS}; {_FOUR_NORMS}",
    "gemma3n": _FOUR_NORMS,
    "gemma4": _FOUR_NORMS,
    "glm4v": _FOUR_NORMS,
    "paligemma": _BOTH_WAYS,
    "ministral3": _POSITIONS,
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
    return len((complete(config).get("vision_config") or {}).get("deepstack_visual_indexes") or ())


def families_with_videos() -> str:
    """Those that take videos, for a hint."""
    names = [family.name for family in FAMILIES if family.videos]
    return f"{', '.join(names[:-1])} and {names[-1]} do"


def refuse_unfit(model_type: object) -> None:
    """Refuse a dense or p-MoD ``model_type`` that p-MoD does not fit, with the reason; it may be anything else."""
    base = str(model_type).removeprefix(_OURS)
    if base in REFUSED:
        raise PmodError(f"{base} cannot become p-MoD: {REFUSED[base]}")


def find_family(model_type: str, unlisted: bool = False) -> Family:
    """The family of a dense or p-MoD ``model_type``; a `PmodError` names those that exist.

    With ``unlisted``, and for a p-MoD type, that may be any family of transformers (`pmod_cli.families.anything`).
    """
    for family in FAMILIES:
        if model_type in (family.base_type, family.model_type):
            return family
    refuse_unfit(model_type)
    base = model_type.removeprefix(_OURS)
    if (unlisted or base != model_type) and (architecture := _architecture(base)):
        return Family(base, base, f"Pmod{architecture}", (), True, _ANYWHERE, ())
    supported = ", ".join(family.base_type for family in FAMILIES)
    raise PmodError(f"model type {model_type!r} is not supported", f"supported: {supported}")


def _architecture(base: str) -> str | None:
    """Name of transformers' image-text-to-text class of a model type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    name = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(base)
    return name if isinstance(name, str) else None


def check_decoder(family: Family, config: dict[str, Any]) -> None:
    """Refuse a language model that cannot become p-MoD: of another architecture, or with a sliding window."""
    text = text_part(config)
    kind = text.get("model_type") or family.default_decoder
    if kind in REFUSED:
        raise PmodError(f"language model {kind!r} cannot become p-MoD: {REFUSED[kind]}")
    odd = set(text.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    if odd:
        raise PmodError(
            f"the language model has layers with {', '.join(sorted(odd))}, which cannot leave tokens out"
        )
    if family.listed and kind not in family.decoders:
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
    """Register the classes of a p-MoD ``model_type``, if it is one, or those of all listed families."""
    for family in FAMILIES:
        if model_type in (None, family.model_type):
            importlib.import_module(f"pmod_cli.families.{family.name}")
    listed = {family.model_type for family in FAMILIES}
    if model_type and model_type.startswith(_OURS) and model_type not in listed:
        base = model_type.removeprefix(_OURS)
        if base not in REFUSED and _architecture(base):
            from pmod_cli.families.anything import classes_of

            classes_of(base)
