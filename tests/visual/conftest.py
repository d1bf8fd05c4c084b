"""Models shared by the tests of pictures."""

from __future__ import annotations

import pytest
import torch
import visual_models


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def llava():
    return visual_models.make("llava")


@pytest.fixture(scope="session")
def llava_next():
    return visual_models.make("llava_next")


@pytest.fixture(scope="session")
def checkpoint(llava, tmp_path_factory):
    return visual_models.save(llava, tmp_path_factory.mktemp("visual") / "model")
