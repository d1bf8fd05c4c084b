"""Counting by ``torch.utils.flop_counter``: what the real model runs on the meta device, operator by operator.

Unlike fvcore's trace it sees the vision tower's unused last layers, which do run, and it counts no LayerNorm.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pmod_cli.profiling.closed_form import PhaseCount
from pmod_cli.profiling.paths import (
    Counts,
    DecoderPath,
    VisionPath,
    assemble,
    autocast_off,
    cache_lengths,
    decoder_input,
    empty_cache,
    pixel_input,
    routing_plan,
)
from pmod_cli.profiling.prompt import Workload


@autocast_off()
def count(model: Any, work: Workload) -> tuple[PhaseCount, PhaseCount]:
    """Run a prefill and the first decode step.

    Args:
        model: Dense or p-MoD, on the meta device (on the CPU torch counts fused attention as nothing).
        work: Image, text and batch.

    Returns:
        MACs of prefill and of the decode step.
    """
    tokens = work.prompt_tokens
    cache = empty_cache(model)
    path = DecoderPath(model, work, cache, routing_plan(model, work))
    prefill = _run(path, *decoder_input(model, work, tokens, tokens))
    lengths = cache_lengths(cache)
    step = _run(DecoderPath(model, work, cache), *decoder_input(model, work, 1, tokens + 1))
    vision = _run(VisionPath(model), pixel_input(model, work)) if work.image else {}
    return assemble(prefill, vision, lengths), assemble(step, {}, [1] * len(lengths))


def _run(module: nn.Module, *inputs: torch.Tensor) -> Counts:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    prefix = f"{type(module).__name__}."
    return {
        name.removeprefix(prefix): {str(operator): flops // 2 for operator, flops in counts.items()}
        for name, counts in counter.get_flop_counts().items()
    }
