"""The processes of one evaluation, as ``torchrun`` or ``accelerate launch`` started them; one if neither did."""

from __future__ import annotations

import contextlib
import os
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from pmod_cli.devices import world_size

T = TypeVar("T")

_PATIENCE = timedelta(hours=3)
"""How long one process waits for another: there may be a download, or much longer answers, between them."""


def join(device: str | None) -> None:
    """Join the other processes, if there are any: over NCCL on GPUs, over gloo on CPUs.

    Args:
        device: What the user asked for; ``cpu`` keeps off the GPUs.
    """
    if world_size() > 1:
        PartialState(cpu=device == "cpu" or not torch.accelerator.is_available(), timeout=_PATIENCE)


def own_device(device: str | None) -> str | None:
    """The device of this process: its own GPU on its machine, unless the user named one.

    Args:
        device: ``cpu``, ``cuda``, ``cuda:1`` ... or None for a GPU if there is one.
    """
    if world_size() > 1 and device in (None, "cuda") and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return device


def gather(value: T) -> list[T]:
    """The values of all processes, by rank."""
    return [value] if world_size() == 1 else gather_object([value])


def one_first() -> contextlib.AbstractContextManager[Any]:
    """Within it, one process per machine goes first, and the others find what it left on the disk."""
    return contextlib.nullcontext() if world_size() == 1 else PartialState().local_main_process_first()
