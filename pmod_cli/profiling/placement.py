"""Puts the models of a profile on a device; a p-MoD model and its own dense baseline share their weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto import AutoModelForImageTextToText

from pmod_cli.checkpoints.load import check_source, check_weights
from pmod_cli.modeling.twin import dense_twin
from pmod_cli.output.errors import PmodError, told_as
from pmod_cli.output.units import size
from pmod_cli.profiling.closed_form import parameters
from pmod_cli.profiling.prompt import DTYPE_BYTES
from pmod_cli.profiling.subject import Subject, Variant


def load_models(
    subject: Subject, device: torch.device, dtype: str, allow_pickle: bool = False
) -> dict[str, Any]:
    """Load the models by ``pmod`` and ``dense``; random weights where only a config is known.

    Raises:
        PmodError: They do not fit in memory, or cannot be read.
    """
    pmod, dense = subject.pmod, subject.dense
    if pmod and dense and (pmod.raw, pmod.weights) == (dense.raw, dense.weights):
        _check_memory([pmod], device, dtype)
        model = _load(pmod, device, dtype, allow_pickle)
        return {"pmod": model, "dense": dense_twin(model, dense.config, dtype)}
    _check_memory(list(subject.variants.values()), device, dtype)
    return {role: _load(variant, device, dtype, allow_pickle) for role, variant in subject.variants.items()}


def _load(variant: Variant, device: torch.device, dtype: str, allow_pickle: bool) -> Any:
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "attn_implementation": "sdpa"}
    if variant.weights is None:
        torch.manual_seed(0)
        with torch.device(device):
            return AutoModelForImageTextToText.from_config(variant.config, **options).eval()
    check_source(variant.weights)
    check_weights(variant.weights, allow_pickle)
    hint = None if allow_pickle else "--allow-pickle reads .bin weights, with torch's weights_only reader"
    with told_as(f"cannot load {variant.weights}", hint):
        model = AutoModelForImageTextToText.from_pretrained(
            variant.weights,
            config=variant.config,
            use_safetensors=None if allow_pickle else True,
            trust_remote_code=False,
            **options,
        )
    return model.to(device).eval()


def _check_memory(variants: list[Variant], device: torch.device, dtype: str) -> None:
    needed = sum(sum(parameters(variant.geometry, variant.mod).values()) for variant in variants)
    needed *= DTYPE_BYTES[dtype]
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_memory()
    if free is not None and needed > free:
        raise PmodError(
            f"the weights take {size(needed)} in {dtype}, {size(needed - free)} more than are free on {device}",
            "counting needs no weights: leave --latency out, or try --dtype bfloat16",
        )


def _free_memory() -> int | None:
    """Bytes of memory that can be had; None where there is no cheap way to know."""
    table = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s*(\d+)", table.read_text()) if table.is_file() else None
    return int(found[1]) * 1024 if found else None
