"""Shared by all tests: no network, few threads, and the helper modules beside each test on the path."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

os.environ["COLUMNS"] = "120"  # as in a pipe; pytest-xdist says 80 to its processes
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

_here = Path(__file__).parent
sys.path[:0] = [str(_here), str(_here / "modeling"), str(_here / "conversion")]

from small_demo import small_demo  # noqa: E402  (needs the path above)


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory, worker_id):
    """What a small run of ``pmod demo`` leaves; not to be changed."""
    base = tmp_path_factory.getbasetemp()
    return small_demo(base if worker_id == "master" else base.parent)
