"""Counting by fvcore: the real model's graph is traced, and each operator of it counted.

fvcore counts one per multiply-add, knows nothing of fused attention (hence our handle), and leaves out what the
output does not depend on (the vision tower's layers after the selected one).
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pmod_cli.extras import require
from pmod_cli.profiling.closed_form import PhaseCount
from pmod_cli.profiling.paths import (
    Counts,
    DecoderPath,
    VisionPath,
    assemble,
    cache_lengths,
    decoder_input,
    empty_cache,
    pixel_input,
    routing_plan,
)
from pmod_cli.profiling.prompt import Workload


@contextmanager
def _autocast_off() -> Iterator[None]:
    """Answers a model that asks whether autocast is on for the meta device: torch raises instead of saying no."""
    ask = torch.is_autocast_enabled

    def answer(device_type: str | None = None) -> bool:
        if device_type == "meta":
            return False
        return ask() if device_type is None else ask(device_type)

    torch.is_autocast_enabled = answer
    try:
        yield
    finally:
        torch.is_autocast_enabled = ask


@_autocast_off()
def count(model: Any, work: Workload) -> tuple[PhaseCount, PhaseCount]:
    """Trace a prefill and the first decode step.

    Args:
        model: Dense or p-MoD, on the meta device.
        work: Image, text and batch.

    Returns:
        MACs of prefill and of the decode step.

    Raises:
        MissingExtraError: If fvcore is not installed.
    """
    tokens = work.prompt_tokens
    cache = empty_cache(model)
    path = DecoderPath(model, work, cache, routing_plan(model, work))
    with _NoReinterpretation():
        prefill = _trace(path, *decoder_input(model, work, tokens, tokens))
    lengths = cache_lengths(cache)
    step = _trace(DecoderPath(model, work, cache), *decoder_input(model, work, 1, tokens + 1))
    vision: Counts = {}
    if work.image:
        encoder = VisionPath(model)
        with _traceable_patches(encoder.tower):
            vision = _trace(encoder, pixel_input(model, work))
    return assemble(prefill, vision, lengths), assemble(step, {}, [1] * len(lengths))


def _trace(module: nn.Module, *inputs: Tensor) -> Counts:
    with torch.no_grad(), warnings.catch_warnings(), _collector_paused():
        warnings.simplefilter("ignore")  # fvcore's use of torch.jit
        require("fvcore")
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(module, inputs)
        analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_macs)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        return analysis.by_module_and_operator()


def _attention_macs(inputs: list[Any], _outputs: list[Any]) -> int:
    """Score and value products: query [..., S, D] with key [..., S_k, D] and value [..., S_k, D_v]."""
    query, key, value = (argument.type().sizes() for argument in inputs[:3])
    return prod(query) * key[-2] + prod(query[:-1]) * key[-2] * value[-1]


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Spares a fifth of the time: a trace makes many objects, and none of them is garbage before its end."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class _NoReinterpretation(TorchFunctionMode):
    """Casts where a model reinterprets bits (``view(dtype)``, which torch.jit cannot trace): shapes stay the same."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.view and len(args) == 2 and isinstance(args[1], torch.dtype):
            func = Tensor.to
        return func(*args, **(kwargs or {}))


class _UnfoldedPatches(nn.Module):
    """A patch convolution as unfold and linear, the same multiply-adds: on meta a convolution cannot be traced."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.convolution, self.weight = convolution, convolution.weight

    def forward(self, pixels: Tensor) -> Tensor:
        patches = F.unfold(pixels, self.convolution.kernel_size, stride=self.convolution.stride)
        features = F.linear(patches.transpose(1, 2), self.weight.flatten(1), self.convolution.bias)
        return features.transpose(1, 2)[..., None]


@contextmanager
def _traceable_patches(tower: Any) -> Iterator[None]:
    embeddings = tower.embeddings
    convolution = embeddings.patch_embedding
    embeddings.patch_embedding = _UnfoldedPatches(convolution)
    try:
        yield
    finally:
        embeddings.patch_embedding = convolution
