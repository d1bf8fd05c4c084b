"""Models shared by the tests of pictures."""

from __future__ import annotations

import pytest

from pmod_cli.generation import VisionLanguageModel
from tests.common import visual_models


@pytest.fixture(scope="session")
def llava():
    return visual_models.make("llava")


@pytest.fixture(scope="session")
def llava_next():
    return visual_models.make("llava_next")


@pytest.fixture(scope="session")
def onevision():
    """LLaVA-OneVision, whose maps of more than two tiles are shrunk."""
    from tests.common import onevision_models

    return VisionLanguageModel(onevision_models.pmod_model(), onevision_models.processor())
