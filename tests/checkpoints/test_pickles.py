"""Pickled weights that are none, or none that can be read as they are."""

from __future__ import annotations

import io
import zipfile

import pytest
import torch

from pmod_cli.checkpoints.shards import read_header, read_pickle
from pmod_cli.output.errors import PmodError
from tests.robustness.files import PICKLES, POINTER


class Evil:
    def __reduce__(self):
        return print, ("hit",)


def saved(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def rewritten(change, how=zipfile.ZIP_STORED):
    """torch's zip, each member of it changed by its name."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(saved({"a": torch.ones(64)}))) as old,
        zipfile.ZipFile(buffer, "w", how) as new,
    ):
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return buffer.getvalue()


def negative():
    return torch._neg_view(torch.ones(2))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *((content, "torch.save did not write it|more than weights|not the weights") for content in PICKLES.values()),
        (rewritten(lambda name, data: b"junk" if name.endswith("data.pkl") else data), "is corrupt"),
        (rewritten(lambda name, data: data, zipfile.ZIP_DEFLATED), "is corrupt"),
        (saved({"a": Evil()}), "holds more than weights"),
        (saved({1: torch.ones(2)}), "is not a state dict"),
        (saved({("a", 1): torch.ones(2)}), "is not a state dict"),
        (saved({"a": 1}), "is not a state dict"),
        (saved([torch.ones(2)]), "is not a state dict"),
        (saved({"a": torch.eye(2).to_sparse()}), "a is no plain tensor"),
        (saved({"a": torch.ones(2, device="meta")}), "a is no plain tensor"),
        (saved({"a": torch.nested.nested_tensor([torch.ones(2)])}), "a is no plain tensor"),
        (saved({"a": negative()}), "a is no plain tensor"),
        (saved({"a": torch.ones(2, dtype=torch.complex64)}), "not supported"),
        (POINTER, "is a Git LFS pointer, not the weights .git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "is a web page"),
    ],
)  # fmt: skip
def test_a_pickle_that_cannot_be_read_is_told_in_one_line(tmp_path, content, message):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(content)
    with pytest.raises(PmodError, match=message) as caught:
        read_pickle(path, True)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)


def test_a_zip_that_is_stored_is_read(tmp_path):
    (tmp_path / "a.bin").write_bytes(rewritten(lambda name, data: data))
    assert read_pickle(tmp_path / "a.bin", True)["a"].read() == torch.ones(64).numpy().tobytes()


def test_what_stands_in_the_place_of_a_safetensors_file(tmp_path):
    path = tmp_path / "model.safetensors"
    for content, message in ((POINTER, "Git LFS pointer"), (b"<html>", "web page")):
        path.write_bytes(content)
        with pytest.raises(PmodError, match=message):
            read_header(path)
    with pytest.raises(PmodError, match="no file"):
        read_header(tmp_path / "gone")
