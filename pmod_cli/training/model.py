"""The model and its processor as a recipe wants them: what is frozen, LoRA, pictures and chat template."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from pmod_cli.checkpoints.load import read_config
from pmod_cli.extras import require
from pmod_cli.families import processing
from pmod_cli.families.agreement import agree
from pmod_cli.families.chat_templates import VICUNA_V1, fit_template
from pmod_cli.families.image_processors import PmodLlavaImageProcessor
from pmod_cli.generation import VisionLanguageModel
from pmod_cli.kernels import use_kernels
from pmod_cli.modeling.layer import MoDDecoderLayer
from pmod_cli.modeling.names import is_router
from pmod_cli.output.errors import PmodError, told_as
from pmod_cli.recipe import TrainSettings

LORA_TARGETS = (
    r".*\.(?:language_model|text_model)\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
)
"""Names of the layers that get low-rank updates; routers and projector are trained in full."""

MAX_TILES = 4
"""Sub-images of LLaVA-NeXT in the paper's runs, beside the overview."""

PARTS = ("routers", "vision tower", "projector", "image newline", "language model")
_NAMES = {
    "projector": re.compile(r"(?:^|\.)(\w*projector|connector|\w*merger\w*(?:\.\d+)?)\."),
    "vision tower": re.compile(r"(?:^|\.)(?:vision\w*|visual)\."),
    "image newline": re.compile(r"(?:^|\.)image_newline$"),
}
"""A part by a module's name in its parameters' full names; a merger stands inside the vision tower."""


def part_of(name: str) -> str:
    """The one of `PARTS` that a parameter belongs to, by its full name."""
    if is_router(name):
        return "routers"
    return next((part for part, names in _NAMES.items() if names.search(name)), "language model")


def count_parts(model: nn.Module) -> list[dict[str, Any]]:
    """How many parameters of each ``part`` that the model has are ``trained``, and how many ``frozen``."""
    counts: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        count = counts.setdefault(part, {"part": part, "trained": 0, "frozen": 0})
        count["trained" if parameter.requires_grad else "frozen"] += parameter.numel()
    return [counts[part] for part in PARTS if part in counts]


def freeze(model: nn.Module, *, vision_tower: bool, parts: Sequence[str] | None = None) -> None:
    """Train these of `PARTS` alone; with None everything, except the vision tower if it is to be frozen."""
    for name, parameter in model.named_parameters():
        part = part_of(name)
        trained = part in parts if parts is not None else not (vision_tower and part == "vision tower")
        parameter.requires_grad_(trained)


def load_for_training(model: str | Path, settings: TrainSettings) -> tuple[Any, Any]:
    """The network, on the CPU, and its processor; `PmodError` if it cannot be loaded or the recipe does not fit."""
    # Weights that are trained need float32: bfloat16 would round small updates away, and a resumed run's.
    dtype = "float32" if settings.lora is None else settings.dtype
    loaded = VisionLanguageModel.load(
        model, dtype=dtype, device="cpu", attn_implementation=settings.attn_implementation, kernels="torch"
    )
    network: Any = loaded.model
    use_kernels(network, settings.kernels, on_gpu=torch.cuda.is_available())
    processor = _set_up(network.config, loaded.processor, settings)
    if settings.gradient_checkpointing:
        # Renamed in transformers 5.24.
        enable = getattr(network, "activation_checkpointing_enable", None)
        (enable or network.gradient_checkpointing_enable)({"use_reentrant": False})
    if settings.learns_choice:
        learn_choice(network)
    if settings.lora is not None:
        return add_lora(network, settings), processor
    freeze(network, vision_tower=settings.freeze_vision_tower, parts=settings.parts)
    if settings.parts is not None:
        _shrink_frozen(network, getattr(torch, settings.dtype))
    return network, processor


def check_parts(network: Any, settings: TrainSettings) -> None:
    """Refuse a run that would train nothing, or would distil a dense model into itself."""
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise PmodError(f"the model has none of train.parts: {', '.join(settings.parts or ())}")
    if settings.distill and not any(is_router(name) for name, _ in network.named_parameters()):
        raise PmodError("train.distill is for a p-MoD model, and this one is dense", "pmod convert it first")
    if settings.learns_choice and network.config.mod_config.choice == "random":
        raise PmodError("train.parts teaches routers to choose, and this model's tokens are random")


def _shrink_frozen(network: nn.Module, dtype: torch.dtype) -> None:
    for parameter in network.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def load_processor(model: str | Path, settings: TrainSettings) -> Any:
    """The processor alone, as training would use it; `PmodError` as in `load_for_training`."""
    config = read_config(model)
    with told_as(f"cannot load the processor of {model}"):
        processor = processing.load_processor(model)
    return _set_up(config, agree(config, processor), settings)


def _set_up(config: Any, processor: Any, settings: TrainSettings) -> Any:
    processor = apply_aspect(config, processor, settings.image_aspect_ratio)
    if settings.chat_template == "vicuna_v1":
        processor.chat_template = fit_template(VICUNA_V1, processor.tokenizer, processor.image_token)
    return processor


def apply_aspect(config: Any, processor: Any, aspect: str) -> Any:
    """Set a model's config and processor to the shape in which pictures come to the vision tower, as LLaVA was trained.

    Both are changed in place, and the processor is returned. The aspect is ``pad`` (LLaVA-1.5: pad to a square with the
    mean colour), ``anyres`` (LLaVA-NeXT, at most `MAX_TILES` sub-images) or ``processor`` (as the checkpoint has it);
    that of the other family is a `PmodError`.
    """
    tiled = hasattr(config, "image_grid_pinpoints")
    if aspect == "pad":
        if tiled:
            raise PmodError("train.image_aspect_ratio=pad is LLaVA-1.5's", "LLaVA-NeXT takes anyres")
        if not isinstance(processor.image_processor, PmodLlavaImageProcessor):  # CLIP's, which crops
            given = processor.image_processor.to_dict()
            names = (
                "size",
                "crop_size",
                "image_mean",
                "image_std",
                "rescale_factor",
                "resample",
                "do_convert_rgb",
            )
            kept = {name: given[name] for name in names if given.get(name) is not None}
            processor.image_processor = LlavaImageProcessorPil(**kept, do_resize=True, do_center_crop=True)
        processor.image_processor.do_pad = True
    elif aspect == "anyres":
        if not tiled:
            raise PmodError("train.image_aspect_ratio=anyres is LLaVA-NeXT's", "LLaVA-1.5 takes pad")
        side = config.vision_config.image_size
        grids = [
            [height, width]
            for height, width in config.image_grid_pinpoints
            if (height // side) * (width // side) <= MAX_TILES
        ]
        if not grids:
            raise PmodError(f"no entry of image_grid_pinpoints has at most {MAX_TILES} sub-images")
        config.image_grid_pinpoints = processor.image_processor.image_grid_pinpoints = grids
    return processor


def learn_choice(network: nn.Module) -> None:
    """Let routers be trained through the choice of tokens (`pmod_cli.modeling.choice`)."""
    for layer in network.modules():
        if isinstance(layer, MoDDecoderLayer):
            layer.learns_choice = True


def add_lora(model: nn.Module, settings: TrainSettings) -> Any:
    """Wrap a model for LoRA with PEFT; what is trained is in float32, whatever the base is in."""
    lora, parts = settings.lora, settings.parts
    assert lora is not None
    require("peft")
    from peft import LoraConfig, get_peft_model

    names = [name for name, _ in model.named_parameters()]
    in_full = set()
    if parts is None or "routers" in parts:
        in_full |= {"router" for name in names if is_router(name)}
    if parts is None or "projector" in parts:
        in_full |= {match[1] for name in names if (match := _NAMES["projector"].search(name))}
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=LORA_TARGETS,
        modules_to_save=sorted(in_full),
    )
    wrapped = get_peft_model(model, config)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return wrapped
