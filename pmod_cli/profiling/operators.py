"""Counts of what a forward pass dispatches: on a GPU at batch 1 the host, which starts every operator, is the limit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode

_NO_WORK = {"_unsafe_view", "detach", "empty", "empty_like", "new_empty", "lift_fresh", "alias"}


class OperatorCount(TorchDispatchMode):
    """A context that counts dispatched operators which do work; views and allocations are left out.

    A fused kernel (``pmod::...``) is one operator, whatever runs inside. Works on every device, meta included.

    Attributes:
        operators: Name of each operator, e.g. ``aten.mul.Tensor``, and how often it was called.
        synchronisations: How often the host read from a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.synchronisations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch for every operator."""
        if not func.is_view and func.overloadpacket.__name__ not in _NO_WORK:
            self.operators[str(func)] += 1
        result = func(*args, **(kwargs or {}))
        source = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if source is not None and source.is_cuda:
            read = func.overloadpacket.__name__ == "_local_scalar_dense"
            self.synchronisations += read or (isinstance(result, torch.Tensor) and result.is_cpu)
        return result

    @property
    def total(self) -> int:
        """Operators in all."""
        return self.operators.total()


def device_busy(call: Callable[[], None]) -> float:
    """Seconds in which a GPU works during a call, by torch's profiler. Far below wall time, the host is the limit."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in trace.key_averages()) / 1e6
