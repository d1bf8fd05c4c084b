"""The device and number format of a command, and which of several processes it is."""

from __future__ import annotations

import os
import re
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from pmod_cli.output.errors import PmodError, first_line, is_out_of_memory, told_as

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

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
        torch.zeros(1, device=found).item()  # "meta" has no numbers
    except Exception as error:  # of any kind: torch imports a module by the name
        raise PmodError(
            f"no device {device} here: {first_line(error)}", "auto, cpu, cuda, cuda:0 ...; or leave it out"
        ) from error
    return found


def is_of_the_device(error: BaseException) -> bool:
    """Whether it is the device's own, out of memory included, whatever was computed on it."""
    import torch

    return is_out_of_memory(error) or isinstance(error, torch.AcceleratorError) or "CUDA" in str(error)


def check_dtype(dtype: str) -> None:
    """Refuse a number format that is not one of `DTYPES`."""
    if dtype not in DTYPES:
        raise PmodError(f"no dtype {dtype}", f"one of {', '.join(DTYPES)}")


_LEAST = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": -1, "LOCAL_WORLD_SIZE": 1}
_SWITCHES = re.compile(r"ACCELERATE_(DYNAMO_)?USE_\w+|ACCELERATE_DEBUG_MODE|ACCELERATE_CPU_AFFINITY")
_SWITCHED = {
    "y",
    "yes",
    "t",
    "true",
    "on",
    "1",
    "n",
    "no",
    "f",
    "false",
    "off",
    "0",
}  # as accelerate reads them


def check_launch() -> None:
    """Refuse variables of torchrun and accelerate launch that mean nothing, before any work."""
    hint = "torchrun and accelerate launch set it; unset it to start one process"
    for name, least in _LEAST.items():
        value = os.environ.get(name, str(least))
        try:
            meant = int(value) >= least
        except ValueError:
            meant = False
        if not meant:
            raise PmodError(f"{name}={value} in the environment is no number of {least} or more", hint)
    if rank() >= world_size():
        raise PmodError(f"RANK={rank()} in the environment is not below WORLD_SIZE, {world_size()}", hint)
    for name, value in os.environ.items():
        if _SWITCHES.fullmatch(name) and value.lower() not in _SWITCHED:
            raise PmodError(f"{name}={value} in the environment is neither true nor false", "unset it")
    if "ACCELERATE_DYNAMO_BACKEND" in os.environ:
        from accelerate.utils import TorchDynamoPlugin

        with told_as("ACCELERATE_DYNAMO_BACKEND in the environment", "unset it"):
            TorchDynamoPlugin()


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


def join(device: str | None) -> None:
    """Join the other processes, if there are any: over NCCL on GPUs, over gloo on CPUs.

    Args:
        device: What the user asked for; ``cpu`` keeps off the GPUs.
    """
    if world_size() > 1:
        import torch
        from accelerate import PartialState

        on_cpu = device == "cpu" or not torch.accelerator.is_available()
        # One may wait for another's download, or for much longer answers.
        with told_as("cannot join the other processes", "start them with torchrun or accelerate launch"):
            PartialState(cpu=on_cpu, timeout=timedelta(hours=3))


def own_device(device: str | None) -> str | None:
    """The device of this process: its own GPU on its machine, unless the user named one."""
    import torch

    if world_size() > 1 and device in (None, "cuda") and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return device


def gather(value: T) -> list[T]:
    """The values of all processes, by rank."""
    if world_size() == 1:
        return [value]
    from accelerate.utils import gather_object

    return gather_object([value])


def one_first() -> AbstractContextManager[Any]:
    """Within it, one process per machine goes first, and the others find what it left on the disk."""
    if world_size() == 1:
        return nullcontext()
    from accelerate import PartialState

    return PartialState().local_main_process_first()
