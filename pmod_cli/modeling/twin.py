"""Models without storage, and twins of a loaded model, dense or routed, on the very same tensors."""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.auto import AutoModelForImageTextToText

from pmod_cli.modeling.names import is_router
from pmod_cli.modeling.router import Router


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
    return _share(pmod, meta_model(config, dtype))


def routed_twin(model: Any, config: Any, dtype: str) -> Any:
    """A p-MoD model on the tensors of a loaded model, dense or p-MoD; its routers are new ones of zeros.

    Args:
        model: The loaded model.
        config: The p-MoD model's config.
        dtype: Of the weights.
    """
    twin = _share(model, meta_model(config, dtype))
    for module in twin.modules():
        if isinstance(module, Router):
            module.to_empty(device=model.device)
            module.reset_parameters()
    return twin


def _share(model: Any, twin: Any) -> Any:
    """Give a model without storage the tensors of another, but for routers, which stay without."""
    weights = {name: tensor for name, tensor in model.state_dict().items() if not is_router(name)}
    missing, unexpected = twin.load_state_dict(weights, strict=False, assign=True)
    assert not unexpected
    assert all(map(is_router, missing))
    for name, module in twin.named_modules():
        # Buffers that checkpoints leave out (rotary frequencies, position ids) are still on meta.
        for buffer in module._buffers:
            setattr(module, buffer, getattr(model.get_submodule(name), buffer))
    twin.generation_config = model.generation_config
    return twin.eval()
