"""The device and number format of a command, and which of several processes it is."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pmod_cli.output.errors import PmodError, first_line

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "bfloat16", "float16", "float32")
"""Number formats of weights; ``auto`` is the checkpoint's own."""


def find_device(device: str | torch.device | None) -> torch.device:
    """A device by name (``cpu``, ``cuda``, ``cuda:1`` ...); for None and ``auto`` a GPU if there is one, else the CPU.

    Raises:
        PmodError: There is no such device on this machine.
    """
    import torch

    if device in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise PmodError(
            f"no device {device} here: {first_line(error)}", "auto, cpu, cuda, cuda:0 ...; or leave it out"
        ) from error
    return found


def check_dtype(dtype: str) -> None:
    """Refuse a number format that is not one of `DTYPES`."""
    if dtype not in DTYPES:
        raise PmodError(f"no dtype {dtype}", f"one of {', '.join(DTYPES)}")


def rank() -> int:
    """This process's rank, as torchrun or accelerate launch say; 0 if it is alone."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes there are, likewise."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """How many processes there are on this machine, likewise."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this is the process that shows and writes."""
    return rank() == 0
