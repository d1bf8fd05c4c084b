"""LoRA through PEFT: low-rank updates of the decoder's linear layers, routers and projector in full."""

from __future__ import annotations

from typing import Any

from torch import nn

from pmod_cli.extras import require
from pmod_cli.modeling.names import is_router
from pmod_cli.recipe import LoraSettings

TARGETS = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"


def add_lora(model: nn.Module, settings: LoraSettings) -> Any:
    """Wrap a model for LoRA; what is trained is in float32, whatever the base is in.

    Raises:
        MissingExtraError: PEFT is not installed.
        BrokenPackageError: PEFT cannot be imported.
    """
    require("peft")
    from peft import LoraConfig, get_peft_model

    whole = ["multi_modal_projector"]
    if any(is_router(name) for name, _ in model.named_parameters()):
        whole.append("router")
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=TARGETS,
        modules_to_save=whole,
    )
    wrapped = get_peft_model(model, config)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return wrapped


def merge(model: Any) -> nn.Module:
    """Fold the low-rank updates in: the base model again, with the trained weights."""
    merged: nn.Module = model.merge_and_unload()
    return merged
