"""Shared by all tests: no network, few threads, the demo's shipped checkpoint and a little data."""

from __future__ import annotations

import gc
import json
import os
import signal
from pathlib import Path

import pytest

os.environ["COLUMNS"] = "120"  # as in a pipe; pytest-xdist says 80 to its processes
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it

import torch
from hypothesis import settings

from pmod_cli.demo import data
from pmod_cli.demo.job import BASELINE
from pmod_cli.modeling.settings import MoDConfig
from pmod_cli.recipe import Recipe, parse_recipe
from tests.common.small_demo import small_demo

settings.register_profile("pmod", deadline=None)  # time says nothing on a machine that does other work too
settings.load_profile("pmod")

SLOW = (
    "robustness/test_slice.py",
    "docs/test_docs.py",
    "training/test_sharded.py",
    "training/test_distributed.py",
    "calibration/test_calibrate.py",
    "checkpoints/test_hub.py",
    "modeling/test_kernels.py",
)
"""Files that come first, so that at the end no process waits for another that has just begun one of them.

pytest-xdist would begin with the files of most tests.
"""


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    def place(item):
        name = item.path.relative_to(Path(__file__).parent).as_posix()
        return SLOW.index(name) if name in SLOW else len(SLOW)

    items.sort(key=place)


def pytest_collection_finish():
    gc.freeze()


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory, worker_id):
    """What a small run of ``pmod demo`` leaves; not to be changed."""
    base = tmp_path_factory.getbasetemp()
    return small_demo(base if worker_id == "master" else base.parent)


@pytest.fixture(scope="module", autouse=True)
def _imports_are_no_garbage():
    """What a file's tests have imported stays; each collection would look through it, for seconds in all."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    os.environ["PMOD_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def baseline() -> Path:
    return BASELINE


@pytest.fixture(scope="session")
def processor():
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(BASELINE, backend="pil")


@pytest.fixture(scope="session")
def pmod_start(tmp_path_factory) -> Path:
    """The baseline with routers at zero, through the model classes."""
    from transformers import AutoConfig, AutoProcessor

    from pmod_cli.families.llava import PmodLlavaConfig, PmodLlavaForConditionalGeneration

    section = MoDConfig([None, None, 0.8, 0.6, 0.4, 0.2, 0.15, 0.15])
    plain = AutoConfig.from_pretrained(BASELINE).to_dict()
    config = PmodLlavaConfig(
        **{key: plain[key] for key in plain if key != "model_type"}, mod=section.to_dict()
    )
    model = PmodLlavaForConditionalGeneration.from_pretrained(BASELINE, config=config, dtype=torch.float32)
    folder = tmp_path_factory.mktemp("pmod-start")
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(BASELINE, backend="pil").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory) -> tuple[Path, Path]:
    """24 conversations about pictures, and 8 without, in one file; and the pictures' folder."""
    folder = tmp_path_factory.mktemp("data") / "train"
    path, images = data.write_training_data(folder, 24)
    records = json.loads(path.read_text())
    words = ["circle", "square", "red", "blue", "left", "top", "yes", "no"]
    for index, word in enumerate(words):
        turns = [{"from": "human", "value": f"Say {word}."}, {"from": "gpt", "value": word}]
        records.append({"id": f"text-{index}", "conversations": turns})
    path.write_text(json.dumps(records))
    return path, images


@pytest.fixture
def recipe():
    def make(**train: object) -> Recipe:
        settings = {
            "max_steps": 6,
            "global_batch_size": 4,
            "micro_batch_size": 4,
            "learning_rate": 1e-3,
            "dtype": "float32",
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "save_steps": 2,
            "num_workers": 0,
        }
        return parse_recipe({"name": "test", "train": {**settings, **train}})

    return make
