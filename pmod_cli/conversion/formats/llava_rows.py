"""More rows for an embedding table or an output layer, computed while it is copied."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from pmod_cli.checkpoints.shards import StoredTensor
from pmod_cli.output.errors import PmodError

MULTIPLE = 64
"""Tables grow to a multiple of this, as llava-hf's do: matrix units want it."""


def rows_needed(rows: int, token: int) -> int:
    """Rows of a table that has to hold a token, unchanged if it does."""
    return rows if token < rows else -(-(token + 1) // MULTIPLE) * MULTIPLE


def with_mean_rows(tensor: StoredTensor, rows: int) -> StoredTensor:
    """The same table with the mean of its rows below, again and again.

    In the output layer a mean row's logit is the mean of all logits, so that greedy decoding never picks it; in
    the embedding table image features take its place.

    Args:
        tensor: [old rows, hidden].
        rows: How many rows it gets.

    Raises:
        PmodError: Its type is not a floating-point one.
    """
    old, width = tensor.shape
    if old >= rows:
        return tensor
    if tensor.dtype not in ("F32", "F16", "BF16"):
        raise PmodError(f"{tensor.name} is of type {tensor.dtype}, expected F32, F16 or BF16")

    def chunks() -> Iterator[bytes | memoryview]:
        total = np.zeros(width)
        for piece, values in _by_rows(tensor.chunks(), tensor.dtype, width):
            total += values.sum(axis=0, dtype=np.float64)
            yield piece
        mean = encode((total / old).astype(np.float32), tensor.dtype)
        yield mean * (rows - old)

    return replace(tensor, shape=(rows, width), chunks=chunks)


def encode(values: np.ndarray, dtype: str) -> bytes:
    """fp32 numbers as the bytes of a safetensors type, rounded to the nearest.

    Args:
        values: fp32, any shape.
        dtype: ``F32``, ``F16`` or ``BF16``.
    """
    if dtype == "BF16":
        bits = values.view(np.uint32)
        return ((bits + ((bits >> 16) & 1) + 0x7FFF) >> 16).astype("<u2").tobytes()
    return values.astype("<f4" if dtype == "F32" else "<f2").tobytes()


def _decode(data: bytes, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, "<f4" if dtype == "F32" else "<f2")


def _by_rows(
    chunks: Iterable[bytes | memoryview], dtype: str, width: int
) -> Iterator[tuple[bytes, np.ndarray]]:
    """Pieces of whole rows, as bytes and as numbers [rows, width]."""
    row = width * (4 if dtype == "F32" else 2)
    rest = b""
    for chunk in chunks:
        data = rest + bytes(chunk)
        whole = len(data) // row * row
        piece, rest = data[:whole], data[whole:]
        if piece:
            yield piece, _decode(piece, dtype).reshape(-1, width)
