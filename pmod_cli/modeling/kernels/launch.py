"""What the kernels share: whether Triton is there, and how an operator is made of a kernel and its reference."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's interpreter runs the kernels, on the CPU."""

_LIBRARY = torch.library.Library("pmod", "FRAGMENT")


@functools.cache
def available() -> bool:
    """Whether Triton is installed and there is a GPU for it, or its interpreter is on."""
    return importlib.util.find_spec("triton") is not None and (torch.cuda.is_available() or INTERPRETED)


def operator(schema: str, reference: Callable[..., Any], launch: Callable[..., Any]) -> Any:
    """An operator that runs a kernel on GPUs (and in Triton's interpreter), its reference on CPUs.

    Defined by hand and not by ``torch.library.custom_op``, whose wrapper costs more than the launches saved.

    Args:
        schema: E.g. ``scale(Tensor x, float by) -> Tensor``.
        reference: The same in PyTorch; it also says shapes on the meta device.
        launch: Starts the kernel; imports Triton when it is first called.

    Returns:
        The operator's overload, to be called.
    """
    name = schema.split("(")[0]
    if not hasattr(torch.ops.pmod, name):  # a module may run twice: see the package's import hook
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, launch, "CUDA")
        _LIBRARY.impl(name, launch if INTERPRETED else reference, "CPU")
        _LIBRARY.impl(name, reference, "Meta")
    return getattr(torch.ops.pmod, name).default


def block_of(size: int) -> int:
    """The power of two that holds ``size`` elements, as a block of Triton's must be."""
    return 1 << max(size - 1, 15).bit_length()


def warps_of(block: int) -> int:
    """Warps for a block of that many elements: some sixteen elements a thread."""
    return min(max(block // 512, 1), 16)
