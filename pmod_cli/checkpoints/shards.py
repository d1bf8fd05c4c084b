"""Weight files: what is in them, without reading it all, and writing new ones tensor by tensor.

Files of safetensors need no torch. Pickled ones (``.bin``), where the user allows them, are read by
``torch.load(weights_only=True)``, memory-mapped.

The library reads and writes whole tensors, and BF16 only with torch; models are larger than memory.

Format: 8 bytes of header length (little endian), a JSON header (name -> dtype, shape, data_offsets), the data.
"""

from __future__ import annotations

import json
import math
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from pmod_cli.output.errors import PmodError, first_line
from pmod_cli.output.reading import check_regular

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

CHUNK = 1 << 24
"""Bytes held at once while tensors are copied."""

DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


TORCH_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
"""torch's names of safetensors' types, those that pickled weights may have."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is not in memory: what it is, and how to get its bytes.

    Attributes:
        dtype: As safetensors calls it: ``F32``, ``BF16`` ...
        chunks: Gives its bytes (little endian, row-major), piece by piece; called each time they are wanted.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[bytes | memoryview]]

    @property
    def nbytes(self) -> int:
        """Size of its data."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    def read(self) -> bytes:
        """All its bytes, in memory."""
        return b"".join(self.chunks())

    def renamed(self, name: str) -> StoredTensor:
        """The same tensor under another name."""
        return replace(self, name=name)

    @classmethod
    def from_bytes(cls, name: str, dtype: str, shape: Sequence[int], data: bytes) -> StoredTensor:
        """A tensor whose bytes are in memory."""
        return cls(name, dtype, tuple(shape), lambda: (data,))

    @classmethod
    def zeros(cls, name: str, dtype: str, shape: Sequence[int]) -> StoredTensor:
        """A tensor of zeros (which are zero bytes in every dtype)."""
        return cls.from_bytes(name, dtype, shape, bytes(math.prod(shape) * DTYPE_BYTES[dtype]))


@dataclass(frozen=True)
class WeightFile:
    """One file of a checkpoint's weights: its tensors by name, and whether it is a safetensors file (else a pickle)."""

    path: Path
    tensors: dict[str, StoredTensor]
    safe: bool = True

    @property
    def name(self) -> str:
        """Its file name."""
        return self.path.name


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, by name; only the header is read, and the library checks it."""
    _check_weight_file(path)
    try:
        with safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            [length] = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length), object_pairs_hook=_once)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise _corrupt(path, first_line(error)) from None
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPE_BYTES:
            raise PmodError(f"{path}: {name} has type {entry['dtype']}, which is not known")
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        read = partial(_read_range, path, start, end)
        tensors[name] = StoredTensor(name, entry["dtype"], tuple(entry["shape"]), read)
    return tensors


def _check_weight_file(path: Path) -> None:
    """Refuse what cannot be opened, and what downloads leave in the place of weights."""
    try:
        check_regular(path)
        with path.open("rb") as file:
            begin = file.read(64).lstrip().lower()
    except FileNotFoundError:
        raise PmodError(f"no file {path}") from None
    except OSError as error:
        raise PmodError(f"cannot read {path}: {error.strerror}") from error
    if begin.startswith(b"version https://git-lfs"):
        raise PmodError(f"{path} is a Git LFS pointer, not the weights", "git lfs pull")
    if begin.startswith((b"<!doctype", b"<html")):
        raise PmodError(f"{path} is a web page, not the weights", "download it again")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON whose names are all different: the library takes the last of two, others the first."""
    data = dict(pairs)
    if len(data) < len(pairs):
        raise ValueError("its header names a tensor twice")
    return data


def _corrupt(path: Path, why: str) -> PmodError:
    return PmodError(f"{path} is truncated or corrupt: {why}", "download it again")


def _read_range(path: Path, start: int, end: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while start < end:
            data = file.read(min(CHUNK, end - start))
            if not data:
                raise _corrupt(path, "it became shorter while it was read")
            start += len(data)
            yield data


def read_pickle(path: Path, allow: bool) -> dict[str, StoredTensor]:
    """The tensors of a pickled state dict, by name, if pickles are allowed; their data stays on disk until read."""
    if not allow:
        raise PmodError(
            f"{path.name} is pickled, and could run code", "--allow-pickle reads its weights alone"
        )
    import torch

    _check_weight_file(path)
    try:
        zipped = zipfile.is_zipfile(path)  # torch's format before 1.6, which is no zip, cannot be mapped
        if zipped:
            with zipfile.ZipFile(path) as archive:
                if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                    raise ValueError("it is compressed, and would be mapped as it is")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # torch's unpickler raises whatever a stranger's bytes lead it into
        found = re.search(r"GLOBAL (\S+)", str(error))
        why = (
            f"holds more than weights: {found[1]}" if found else "is corrupt, or torch.save did not write it"
        )
        raise PmodError(f"{path} {why}", "download it again") from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items()
    ):
        raise PmodError(f"{path} is not a state dict of tensors")
    return {name: _stored(path, name, tensor) for name, tensor in state.items()}


def _stored(path: Path, name: str, tensor: Any) -> StoredTensor:
    import torch

    plain = tensor.layout is torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.is_nested or tensor.is_neg():
        raise PmodError(
            f"{path}: {name} is no plain tensor", "sparse, nested and meta tensors are not supported"
        )
    kind = str(tensor.dtype).removeprefix("torch.")
    dtype = next((dtype for dtype, name in TORCH_DTYPES.items() if name == kind), None)
    if dtype is None:
        raise PmodError(f"{path}: {name} has type {tensor.dtype}, which is not supported")

    def chunks() -> Iterator[memoryview]:
        flat = tensor.detach().contiguous().flatten().view(torch.uint8)
        for start in range(0, flat.numel(), CHUNK):
            yield memoryview(flat[start : start + CHUNK].numpy())

    return StoredTensor(name, dtype, tuple(tensor.shape), chunks)


def decode(data: bytes, dtype: str) -> np.ndarray:
    """Floating-point numbers (``F64``, ``F32``, ``F16`` or ``BF16``) of their bytes, flat; BF16 as float32."""
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype])


def encode(values: np.ndarray, dtype: str) -> bytes:
    """fp32 numbers as the bytes of ``F32``, ``F16`` or ``BF16``, rounded to the nearest."""
    if dtype == "BF16":
        bits = values.view(np.uint32)
        return ((bits + ((bits >> 16) & 1) + 0x7FFF) >> 16).astype("<u2").tobytes()
    return values.astype("<f4" if dtype == "F32" else "<f2").tobytes()


def shard_bytes(tensors: Sequence[StoredTensor]) -> int:
    """Size of the data of a shard (its header comes on top)."""
    return sum(tensor.nbytes for tensor in tensors)


def write_shard(
    path: Path, tensors: Sequence[StoredTensor], progress: Callable[[int], None] | None = None
) -> None:
    """Write a safetensors file, holding one chunk of one tensor at a time; ``progress`` gets the bytes of each."""
    # The largest types first: each is then aligned.
    ordered = sorted(tensors, key=lambda tensor: -DTYPE_BYTES[tensor.dtype])
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in ordered:
        end = position + tensor.nbytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in ordered:
            written = 0
            for chunk in tensor.chunks():
                file.write(chunk)
                written += len(chunk)
                if progress:
                    progress(len(chunk))
            if written != tensor.nbytes:
                raise PmodError(f"{tensor.name} gave {written} bytes, its shape says {tensor.nbytes}")
