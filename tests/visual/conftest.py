"""Models shared by the tests of pictures."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import visual_models

from pmod_cli.generation import VisionLanguageModel

sys.path.append(str(Path(__file__).parents[1] / "families"))


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
def onevision():
    """LLaVA-OneVision, whose maps of more than two tiles are shrunk."""
    import onevision_models

    return VisionLanguageModel(onevision_models.pmod_model(), onevision_models.processor())
