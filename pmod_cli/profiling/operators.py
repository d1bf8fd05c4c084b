"""Counts of what a forward pass dispatches: on a GPU at batch 1 the host, which starts every operator, is the limit."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

_NO_WORK = {"_unsafe_view", "detach", "empty", "empty_like", "new_empty", "lift_fresh", "alias"}


class OperatorCount(TorchDispatchMode):
    """A context that counts dispatched operators which do work; views and allocations are left out.

    A fused kernel (``pmod::...``) is one operator, whatever runs inside. Works on every device, meta included.

    Attributes:
        operators: Name of each operator, e.g. ``aten.mul.Tensor``, and how often it was called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch for every operator."""
        if not func.is_view and func.overloadpacket.__name__ not in _NO_WORK:
            self.operators[str(func)] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        """Operators in all."""
        return self.operators.total()

    @property
    def synchronisations(self) -> int:
        """How often the host read a value from the device."""
        return self.operators["aten._local_scalar_dense.default"]
