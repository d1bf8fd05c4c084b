"""The model and its processor as a recipe wants them: what is frozen, LoRA, pictures and chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoProcessor

from pmod_cli.checkpoints.load import read_config
from pmod_cli.data.aspect import apply_aspect
from pmod_cli.extras import require
from pmod_cli.families.chat_templates import VICUNA_V1, fit_template
from pmod_cli.generation import IMAGE_BACKEND, VisionLanguageModel
from pmod_cli.modeling.names import is_router
from pmod_cli.output.errors import PmodError, first_line
from pmod_cli.output.tables import Table
from pmod_cli.recipe import LoraSettings, TrainSettings

LORA_TARGETS = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
"""Names of the layers that get low-rank updates; routers and projector are trained in full."""

PARTS = ("routers", "vision tower", "projector", "image newline", "language model")
_PREFIXES = {
    "vision_tower.": "vision tower",
    "multi_modal_projector.": "projector",
    "image_newline": "image newline",
}


@dataclass(frozen=True)
class PartCount:
    """How many parameters of one part are trained, and how many are frozen."""

    part: str
    trained: int
    frozen: int


def part_of(name: str) -> str:
    """The one of `PARTS` that a parameter belongs to, by its full name."""
    if is_router(name):
        return "routers"
    return next((part for prefix, part in _PREFIXES.items() if prefix in name), "language model")


def count_parts(model: nn.Module) -> list[PartCount]:
    """Trained and frozen parameters of the parts that the model has."""
    counts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        counts.setdefault(part_of(name), [0, 0])[0 if parameter.requires_grad else 1] += parameter.numel()
    return [PartCount(part, *counts[part]) for part in PARTS if part in counts]


def parts_table(parts: Sequence[PartCount]) -> Table:
    """The counts as a table."""
    rows: list[Sequence[str]] = [[part.part, f"{part.trained:,}", f"{part.frozen:,}"] for part in parts]
    return Table("Parameters", ("part", "trained", "frozen"), rows)


def freeze(model: nn.Module, *, vision_tower: bool) -> None:
    """Train everything, except the vision tower if it is to be frozen."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (vision_tower and part_of(name) == "vision tower"))


def load_for_training(model: str | Path, settings: TrainSettings) -> tuple[Any, Any]:
    """The network, on the CPU, and its processor.

    Raises:
        PmodError: It cannot be loaded, or the recipe does not fit it.
    """
    # Weights that are trained need float32: bfloat16 would round small updates away.
    dtype = "float32" if settings.lora is None else settings.dtype
    loaded = VisionLanguageModel.load(
        model, dtype=dtype, device="cpu", attn_implementation=settings.attn_implementation
    )
    network: Any = loaded.model
    processor = _set_up(network.config, loaded.processor, settings)
    if settings.gradient_checkpointing:
        # Renamed in transformers 5.24.
        enable = getattr(network, "activation_checkpointing_enable", None)
        (enable or network.gradient_checkpointing_enable)({"use_reentrant": False})
    if settings.lora is not None:
        return _add_lora(network, settings.lora), processor
    freeze(network, vision_tower=settings.freeze_vision_tower)
    return network, processor


def load_processor(model: str | Path, settings: TrainSettings) -> Any:
    """The processor alone, as training would use it.

    Raises:
        PmodError: It cannot be loaded, or the recipe does not fit it.
    """
    config = read_config(model)
    try:
        processor = AutoProcessor.from_pretrained(model, backend=IMAGE_BACKEND)
    except (OSError, ValueError, KeyError) as error:
        raise PmodError(f"cannot load the processor of {model}: {first_line(error)}") from error
    return _set_up(config, processor, settings)


def _set_up(config: Any, processor: Any, settings: TrainSettings) -> Any:
    processor = apply_aspect(config, processor, settings.image_aspect_ratio)
    if settings.chat_template == "vicuna_v1":
        processor.chat_template = fit_template(VICUNA_V1, processor.tokenizer, processor.image_token)
    return processor


def _add_lora(model: nn.Module, settings: LoraSettings) -> Any:
    """Wrap a model for LoRA with PEFT; what is trained is in float32, whatever the base is in."""
    require("peft")
    from peft import LoraConfig, get_peft_model

    has_routers = any(is_router(name) for name, _ in model.named_parameters())
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=LORA_TARGETS,
        modules_to_save=["multi_modal_projector", *(["router"] if has_routers else [])],
    )
    wrapped = get_peft_model(model, config)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return wrapped
