"""Our reading and writing of safetensors files, against the library's."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from pmod_cli.checkpoints import shards
from pmod_cli.checkpoints.shards import StoredTensor, read_header, write_shard
from pmod_cli.output.errors import PmodError

DTYPES = {"F32": np.float32, "F16": np.float16, "I64": np.int64, "U8": np.uint8, "BOOL": np.bool_}


def stored(name, array):
    dtype = next(key for key, value in DTYPES.items() if value == array.dtype)
    return StoredTensor.from_bytes(name, dtype, array.shape, array.tobytes())


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    ),
    st.integers(1, 7),
)
def test_the_library_reads_what_we_write(tmp_path_factory, tensors, chunk):
    arrays = {
        name: np.random.default_rng(0).integers(0, 2, shape).astype(DTYPES[dtype])
        for name, (dtype, shape) in tensors.items()
    }
    path = tmp_path_factory.mktemp("shard") / "a.safetensors"
    write_shard(path, [stored(name, array) for name, array in arrays.items()])
    read = load_file(path)
    assert read.keys() == arrays.keys()
    assert all(np.array_equal(read[name], array) for name, array in arrays.items())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "CHUNK", chunk)
        ours = read_header(path)
        assert {name: tensor.read() for name, tensor in ours.items()} == {
            name: array.tobytes() for name, array in arrays.items()
        }
    assert (path.stat().st_size - sum(tensor.nbytes for tensor in ours.values())) % 8 == 0


def test_we_read_what_the_library_writes(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros((0, 4), np.float16)}
    save_file(arrays, tmp_path / "a.safetensors", metadata={"format": "pt"})
    ours = read_header(tmp_path / "a.safetensors")
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in ours.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("F16", (0, 4)),
    }
    assert ours["a"].read() == arrays["a"].tobytes()
    write_shard(tmp_path / "b.safetensors", list(ours.values()))
    with safe_open(tmp_path / "b.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert np.array_equal(file.get_tensor("a"), arrays["a"])


def broken(path, how):
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])

    def with_header(changed):
        encoded = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        return struct.pack("<Q", len(encoded)) + encoded + data[8 + length :]

    path.write_bytes(
        {
            "cut": lambda: data[:-3],
            "longer": lambda: data + b"\0",
            "header cut": lambda: data[:20],
            "empty": lambda: b"",
            "no header": lambda: b"\xff" * 64,
            "not json": lambda: with_header(b"{" * length),
            "not an object": lambda: with_header([1]),
            "no offsets": lambda: with_header({"a": {"dtype": "F32", "shape": [2]}}),
            "shape": lambda: with_header({**header, "a": {**header["a"], "shape": [7]}}),
            "gap": lambda: with_header({**header, "a": {**header["a"], "data_offsets": [4, 28]}}),
            "negative": lambda: with_header({**header, "a": {**header["a"], "shape": [-2, -3]}}),
            "dtype": lambda: with_header({**header, "a": {**header["a"], "dtype": "F7"}}),
        }[how]()
    )


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut", "not fully covered"),
        ("longer", "not fully covered"),
        ("header cut", "invalid header length"),
        ("empty", "header too small"),
        ("no header", "header too large"),
        ("not json", "invalid JSON"),
        ("not an object", "invalid JSON"),
        ("no offsets", "missing field `data_offsets`"),
        ("shape", "invalid shape"),
        ("gap", "invalid offset for tensor `a`"),
        ("negative", "integer `-2`"),
        ("dtype", "variant `F7`"),
    ],
)
def test_a_broken_file_is_named(tmp_path, how, message):
    path = tmp_path / "a.safetensors"
    save_file({"a": np.zeros((2, 3), np.float32)}, path)
    broken(path, how)
    with pytest.raises(PmodError, match=f"truncated or corrupt: .*{message}") as caught:
        read_header(path)
    assert str(path) in caught.value.message


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": np.zeros(64, np.float32)}, path)
    tensor = read_header(path)["a"]
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(PmodError, match="became shorter"):
        tensor.read()


def test_a_tensor_that_gives_too_few_bytes(tmp_path):
    short = StoredTensor("a", "F32", (4,), lambda: (b"1234",))
    with pytest.raises(PmodError, match="gave 4 bytes"):
        write_shard(tmp_path / "a.safetensors", [short])
