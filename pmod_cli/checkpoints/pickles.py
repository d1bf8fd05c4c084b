"""Pickled weights (``.bin``), where the user allows them: ``torch.load(weights_only=True)``, memory-mapped."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pmod_cli.checkpoints.shards import CHUNK, StoredTensor
from pmod_cli.output.errors import PmodError, first_line

_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
"""safetensors' names of torch's types."""


def read_pickle(path: Path, allow: bool) -> dict[str, StoredTensor]:
    """The tensors of a pickled state dict, by name, if pickles are allowed; their data stays on disk until read."""
    if not allow:
        raise PmodError(
            f"{path.name} holds pickled weights, which can run code when they are loaded",
            "--allow-pickle loads them with torch's weights_only reader",
        )
    import torch

    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"  # torch's format before 1.6 cannot be mapped
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except FileNotFoundError:
        raise PmodError(f"no file {path}") from None
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise PmodError(
            f"{path} is corrupt or holds more than weights: {first_line(error)}", "download it again"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise PmodError(f"{path} is not a state dict of tensors")
    return {name: _stored(path, name, tensor) for name, tensor in state.items()}


def _stored(path: Path, name: str, tensor: Any) -> StoredTensor:
    import torch

    dtype = _DTYPES.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None:
        raise PmodError(f"{path}: {name} has type {tensor.dtype}, which is not supported")

    def chunks() -> Iterator[memoryview]:
        flat = tensor.detach().contiguous().flatten().view(torch.uint8)
        for start in range(0, flat.numel(), CHUNK):
            yield memoryview(flat[start : start + CHUNK].numpy())

    return StoredTensor(name, dtype, tuple(tensor.shape), chunks)
