"""Checkpoints and a local task, made once a session."""

from __future__ import annotations

import os

import pytest

from pmod_cli.evaluation.tasks import write_task
from tests.common.eval_models import save_llava, save_next, save_pmod, write_questions


@pytest.fixture(scope="session")
def llava(tmp_path_factory):
    """Folder of a tiny dense LLaVA checkpoint."""
    return save_llava(tmp_path_factory.mktemp("llava") / "dense", seed=0)


@pytest.fixture(scope="session")
def other_llava(tmp_path_factory):
    """The same with other weights."""
    return save_llava(tmp_path_factory.mktemp("llava") / "other", seed=1)


@pytest.fixture(scope="session")
def pmod(llava, tmp_path_factory):
    """The p-MoD counterpart of `llava`."""
    return save_pmod(llava, tmp_path_factory.mktemp("llava") / "pmod")


@pytest.fixture(scope="session")
def pmod_next(tmp_path_factory):
    """A p-MoD LLaVA-NeXT."""
    return save_next(tmp_path_factory.mktemp("next") / "pmod")


@pytest.fixture(scope="session", autouse=True)
def _dataset_cache(tmp_path_factory):
    """Keep lmms-eval's copies of the data, and answers, out of the home folder."""
    os.environ["LMMS_EVAL_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets"))
    os.environ["PMOD_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def local_task(tmp_path_factory):
    """Folder with the YAML of a task ``local_qa`` of 12 questions, to be used as include path."""
    folder = tmp_path_factory.mktemp("local_task")
    data = write_questions(folder / "data", ["red"] * 12)
    write_task(folder / "yaml", "local_qa", data, ["colour", "shape"])
    return folder / "yaml"
