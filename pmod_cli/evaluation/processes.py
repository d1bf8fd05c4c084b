"""The processes of one evaluation, as ``torchrun`` or ``accelerate launch`` started them; one if neither did."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from pmod_cli.devices import rank, world_size

T = TypeVar("T")

_PATIENCE = timedelta(hours=3)
"""How long one process waits for another: there may be a download, or much longer answers, between them."""


def join(device: str | None) -> None:
    """Join the other processes, if there are any: over NCCL on GPUs, over gloo on CPUs.

    Args:
        device: What the user asked for; ``cpu`` keeps off the GPUs.
    """
    if world_size() > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=device == "cpu" or not torch.accelerator.is_available(), timeout=_PATIENCE)


def own_device(device: str | None) -> str | None:
    """The device of this process: its own GPU of the node's, unless the user named one.

    Args:
        device: ``cpu``, ``cuda``, ``cuda:1`` ... or None for a GPU if there is one.
    """
    import torch

    if world_size() > 1 and device in (None, "cuda") and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return device


def gather(value: T) -> list[T]:
    """The values of all processes, by rank."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def computed_once(compute: Callable[[], T]) -> T:
    """What ``compute`` gives on rank 0, for all."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return compute()
    values = [compute() if rank() == 0 else None]
    dist.broadcast_object_list(values, src=0)
    return values[0]  # type: ignore[return-value]


def one_first() -> contextlib.AbstractContextManager[Any]:
    """Inside of it one process a node goes first, and the others find what it left on the disk."""
    if world_size() == 1:
        return contextlib.nullcontext()
    from accelerate import PartialState

    return PartialState().local_main_process_first()
