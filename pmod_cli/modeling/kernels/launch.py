"""What the kernels share: whether Triton is there, how an operator is made of a kernel and its reference, and a launch.

At batch 1 the host is the limit, so a launch has to cost it little.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

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
        What calls it: on a GPU without torch's dispatcher in between, where no dispatch mode listens.
    """
    name = schema.split("(")[0]
    if not hasattr(torch.ops.pmod, name):  # a module may run twice: see the package's import hook
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, launch, "CUDA")
        _LIBRARY.impl(name, launch if INTERPRETED else reference, "CPU")
        _LIBRARY.impl(name, reference, "Meta")
    overload = getattr(torch.ops.pmod, name).default

    def call(first: Tensor, *arguments: Any) -> Any:
        plain = first.is_cuda and type(first) is Tensor and _get_current_dispatch_mode() is None
        return (launch if plain else overload)(first, *arguments)

    return call


_compiled: dict[Any, Any] = {}


def start(
    kernel: Any,
    grid: int,
    tensors: tuple[Tensor, ...],
    numbers: tuple[float, ...],
    constants: tuple[int, ...],
    warps: int,
) -> None:
    """Launch a kernel on the tensors' device.

    Triton looks at every argument in every launch to find the compiled kernel; here a few of their properties find it
    (https://triton-lang.org/main/getting-started/tutorials/02-fused-softmax.html calls a compiled kernel likewise).

    Args:
        kernel: Of ``triton.jit``; ``numbers`` are in its ``do_not_specialize``.
        grid: Programs.
        tensors: Its first arguments.
        numbers: Its next, each an integer or a float in all launches.
        constants: Its last.
        warps: Of each program.
    """
    if INTERPRETED:
        kernel[(grid,)](*tensors, *numbers, *constants, num_warps=warps)
        return
    device = tensors[0].device.index
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):  # a model spread over several GPUs
            start(kernel, grid, tensors, numbers, constants, warps)
        return
    dtypes, aligned = [each.dtype for each in tensors], [each.data_ptr() % 16 == 0 for each in tensors]
    key = (kernel, device, constants, warps, *dtypes, *aligned)
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[(grid,)](*tensors, *numbers, *constants, num_warps=warps)
    else:
        compiled[(grid, 1, 1)](*tensors, *numbers, *constants)


def block_of(size: int) -> int:
    """The power of two that holds ``size`` elements, as a block of Triton's must be."""
    return 1 << max(size - 1, 15).bit_length()


def warps_of(block: int) -> int:
    """Warps for a block of that many elements: some sixteen elements a thread."""
    return min(max(block // 512, 1), 16)
