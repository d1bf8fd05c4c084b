"""Models without storage, and the dense twin of a p-MoD model on the very same tensors."""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.auto import AutoModelForImageTextToText

from pmod_cli.modeling.names import is_router


def meta_model(config: Any, dtype: str) -> Any:
    """A model without storage.

    Args:
        config: transformers config of a dense or p-MoD model.
        dtype: E.g. ``bfloat16``.
    """
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).eval()


def dense_twin(pmod: Any, config: Any, dtype: str) -> Any:
    """The dense baseline of a loaded p-MoD model, on the very same tensors.

    Args:
        pmod: The p-MoD model.
        config: The dense model's config.
        dtype: Of the weights.
    """
    dense = meta_model(config, dtype)
    weights = {name: tensor for name, tensor in pmod.state_dict().items() if not is_router(name)}
    dense.load_state_dict(weights, assign=True)
    for name, module in dense.named_modules():
        # Buffers that checkpoints leave out (rotary frequencies, position ids) are still on meta.
        for buffer in module._buffers:
            setattr(module, buffer, getattr(pmod.get_submodule(name), buffer))
    dense.generation_config = pmod.generation_config
    return dense.eval()
