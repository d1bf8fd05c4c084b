"""The model and its processor as a recipe wants them: what is frozen, LoRA, pictures and chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoProcessor

from pmod_cli.data.aspect import apply_aspect
from pmod_cli.families.chat_templates import VICUNA_V1, fit_template
from pmod_cli.generation import IMAGE_BACKEND, VisionLanguageModel, check_source
from pmod_cli.output.errors import PmodError
from pmod_cli.recipe import TrainSettings
from pmod_cli.training.lora import add_lora
from pmod_cli.training.parts import freeze


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
        return add_lora(network, settings.lora), processor
    freeze(network, vision_tower=settings.freeze_vision_tower)
    return network, processor


def load_processor(model: str | Path, settings: TrainSettings) -> Any:
    """The processor alone, as training would use it.

    Raises:
        PmodError: It cannot be loaded, or the recipe does not fit it.
    """
    check_source(model)
    try:
        config = AutoConfig.from_pretrained(model)
        processor = AutoProcessor.from_pretrained(model, backend=IMAGE_BACKEND)
    except (OSError, ValueError, KeyError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise PmodError(f"cannot load the processor of {model}: {lines[0]}") from error
    return _set_up(config, processor, settings)


def _set_up(config: Any, processor: Any, settings: TrainSettings) -> Any:
    processor = apply_aspect(config, processor, settings.image_aspect_ratio)
    if settings.chat_template == "vicuna_v1":
        processor.chat_template = fit_template(VICUNA_V1, processor.tokenizer, processor.image_token)
    return processor
