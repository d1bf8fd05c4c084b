"""What is missing is found before a model is loaded, all at once, with what to do about it."""

from __future__ import annotations

import json
import shutil
import socket

import datasets
import huggingface_hub
import pytest
from lmms_eval.api import task

from pmod_cli.evaluation import requirements
from pmod_cli.evaluation.catalogue import Tasks
from pmod_cli.evaluation.diff import pictures_of
from pmod_cli.evaluation.evaluate import evaluate, prepare
from pmod_cli.evaluation.options import EvalSettings
from pmod_cli.evaluation.requirements import PreflightError
from pmod_cli.evaluation.tasks import write_task
from pmod_cli.generation import VisionLanguageModel
from pmod_cli.output.errors import PmodError
from tests.common.hub_standin import HubStandIn
from tests.common.paper_fixtures import Fixtures


@pytest.fixture(scope="module")
def catalogue():
    return Tasks(["gqa", "pope_full", "mmbench_en_dev", "seedbench", "chartqa"])


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The hub's clients talk to a stand-in; nobody is logged in."""
    standin = HubStandIn()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", standin.url)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", standin.url)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_stand_in")
    yield standin
    standin.close()


@pytest.fixture
def no_network(monkeypatch):
    """Any attempt to reach another machine is noted and refused."""
    attempts = []
    connect = socket.socket.connect

    def refuse(self, address):
        if self.family == socket.AF_UNIX:  # between processes of this machine: gqa's code starts some
            return connect(self, address)
        attempts.append(address)
        raise OSError("no network in this test")

    def unknown(host, *arguments, **options):
        attempts.append(host)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    return attempts


@pytest.fixture
def nothing_loads(monkeypatch):
    def load(*arguments, **options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(VisionLanguageModel, "load", load)


def problems_of(catalogue, names, **options):
    with pytest.raises(PreflightError) as caught:
        requirements.check(catalogue, names, **options)
    return {problem.task: (problem.what, problem.remedy) for problem in caught.value.problems}


def test_everything_missing_is_named_at_once(local_task, tmp_path, nothing_loads):
    with pytest.raises(PreflightError) as caught:
        evaluate(tmp_path / "none", ["local_qa", "gqaa", "chartqa"], include_path=local_task, offline=True)
    found = {problem.task: problem for problem in caught.value.problems}
    assert set(found) == {"model", "gqaa", "chartqa"}
    assert "did you mean gqa or" in found["gqaa"].remedy
    assert found["chartqa"].remedy == "pmod eval --prepare --tasks chartqa"
    assert "2 more like it" in str(caught.value)


def test_one_command_gets_all_that_is_absent(local_task):
    with pytest.raises(PreflightError) as caught:
        requirements.check(Tasks(["chartqa", "ai2d"]), ["chartqa", "ai2d"], offline=True)
    assert caught.value.hint == "pmod eval --prepare --tasks chartqa,ai2d"


def test_a_hub_that_is_not_there(catalogue, hub):
    hub.close()
    found = problems_of(catalogue, ["gqa", "seedbench"], checkpoints=["some/model"])
    assert {what for what, _ in found.values()} == {"the hub cannot be reached"}
    assert "--prepare" in found["gqa"][1]


def test_data_that_need_a_login(catalogue, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    found = problems_of(catalogue, ["chartqa"])
    assert found["chartqa"] == ("its data (lmms-lab-encoder/ChartQA) need a hub login", "hf auth login")
    assert not hub.asked


def test_gated_absent_and_failing_repositories(catalogue, hub):
    hub.repositories = {
        "datasets/lmms-lab-encoder/ChartQA": (403, "GatedRepo", 0),
        "datasets/lmms-lab-encoder/SEED-Bench": (500, "", 0),
        "models/some/model": (200, "", 10),
    }
    found = problems_of(catalogue, ["chartqa", "seedbench", "gqa"], checkpoints=["some/model"])
    assert set(found) == {"chartqa", "seedbench", "gqa"}
    assert "datasets/lmms-lab-encoder/ChartQA" in found["chartqa"][1]
    assert "asked for" in found["chartqa"][0]
    assert "not on the hub" in found["gqa"][0]
    assert "refuses" in found["seedbench"][0]


def test_what_would_be_downloaded_has_to_fit_on_the_disk(catalogue, hub):
    size = 10**17
    hub.repositories = {
        "datasets/lmms-lab-encoder/GQA": (200, "", size),
        "models/some/model": (200, "", size),
    }
    found = problems_of(catalogue, ["gqa"], checkpoints=["some/model"])
    assert set(found) == {"all"}
    assert found["all"][0].startswith("up to 200000000.0 GB to download")
    hub.repositories = dict.fromkeys(hub.repositories, (200, "", 10))
    assert requirements.check(catalogue, ["gqa"], checkpoints=["some/model"]) == {"gqa": ["gqa"]}


def test_a_paid_judge_needs_a_key(catalogue, hub, monkeypatch):
    hub.repositories = {"datasets/lmms-lab-encoder/MMBench": (200, "", 10)}
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    found = problems_of(catalogue, ["mmbench_en_dev"])
    assert "paid judge" in found["mmbench_en_dev"][0]
    assert "mmbench_en_dev_static" in found["mmbench_en_dev"][1]
    assert requirements.check(catalogue, ["mmbench_en_dev"], preparing=True)
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    assert requirements.check(catalogue, ["mmbench_en_dev"])
    monkeypatch.setenv("API_TYPE", "azure")
    assert "AZURE_API_KEY" in problems_of(catalogue, ["mmbench_en_dev"])["mmbench_en_dev"][1]


def test_files_that_a_task_names_and_that_are_gone(local_task, tmp_path):
    shutil.copytree(local_task, tmp_path / "yaml")
    path = tmp_path / "yaml" / "local_qa.yaml"
    path.write_text(path.read_text() + f"dataset_kwargs:\n  data_files:\n    test: {tmp_path}/gone.parquet\n")
    found = problems_of(Tasks(["local_qa"], [tmp_path / "yaml"]), ["local_qa"])
    assert f"{tmp_path}/gone.parquet" in found["local_qa"][0]


def test_tasks_that_do_not_generate_are_refused(local_task, tmp_path):
    shutil.copytree(local_task, tmp_path / "yaml")
    path = tmp_path / "yaml" / "local_qa.yaml"
    path.write_text(path.read_text() + "output_type: loglikelihood\n")
    assert (
        "loglikelihood" in problems_of(Tasks(["local_qa"], [tmp_path / "yaml"]), ["local_qa"])["local_qa"][0]
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: [unclosed", "cannot be read"),
        ("just words", "cannot be read"),
        ("include: nowhere.yaml\ntask: broken", "cannot be read"),
        ("task: broken\nprocess_results: !function missing.f\n", "task broken cannot be loaded"),
    ],
)
def test_broken_task_files_are_one_line(text, message, tmp_path, llava):
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(PmodError, match=message):
        evaluate(llava, ["broken"], include_path=tmp_path)


def test_corrupt_data_are_named_before_a_model_is_loaded(tmp_path, llava, nothing_loads, monkeypatch):
    from lmms_eval.api.task import ConfigurableTask
    from tenacity import wait_none

    monkeypatch.setattr(
        ConfigurableTask.download.retry, "wait", wait_none()
    )  # else five tries, two seconds apart
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.parquet").write_bytes(b"not parquet")
    write_task(tmp_path / "yaml", "corrupt", tmp_path / "data")
    with pytest.raises(PmodError, match=r"the data of task corrupt cannot be had: .*[Pp]arquet"):
        evaluate(llava, ["corrupt"], include_path=tmp_path / "yaml")


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """The copies that `datasets` keeps of hub data sets, as they are once pope_full and gqa were downloaded."""
    cache = tmp_path / "hub_datasets"
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(cache))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    task._resolve_hf_datasets_cache_dir.cache_clear()  # it remembers the folder of earlier tests
    fixtures = Fixtures(tmp_path / "fixtures")
    pictures = datasets.Dataset.from_parquet(str(fixtures.folder / "gqa.parquet")).select_columns(
        ["image", "imageId"]
    )
    pictures.rename_column("imageId", "id").to_parquet(fixtures.folder / "gqa_pictures.parquet")
    questions = datasets.Dataset.from_parquet(str(fixtures.folder / "gqa.parquet")).remove_columns("image")
    questions.to_parquet(fixtures.folder / "gqa_questions.parquet")
    for repository, name, splits in (
        ("POPE", "Full", {"adversarial": "pope_adv", "popular": "pope_pop", "random": "pope_random"}),
        ("GQA", "testdev_balanced_instructions", {"testdev": "gqa_questions"}),
        ("GQA", "testdev_balanced_images", {"testdev": "gqa_pictures"}),
    ):
        made = tmp_path / "made"
        files = {split: str(fixtures.folder / f"{file}.parquet") for split, file in splits.items()}
        datasets.load_dataset("parquet", data_files=files, cache_dir=str(made))
        [info] = made.rglob("dataset_info.json")
        copy = cache / f"lmms-lab-encoder___{repository.lower()}" / name / "0.0.0" / ("0" * 40)
        shutil.copytree(info.parent, copy)
        shutil.rmtree(made)
        for file in copy.glob("*.arrow"):
            file.rename(copy / file.name.replace("parquet", repository.lower()))
        described = json.loads((copy / "dataset_info.json").read_text())
        described |= {"dataset_name": repository.lower(), "config_name": name}
        (copy / "dataset_info.json").write_text(json.dumps(described))
    yield fixtures
    task._resolve_hf_datasets_cache_dir.cache_clear()


def test_offline_never_asks_the_network(llava, prepared, no_network, monkeypatch, tmp_path):
    """lmms-eval's own pope_full and gqa, its second data set included, from what was downloaded ahead of time."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    settings = EvalSettings(max_new_tokens=2)
    result = evaluate(llava, ["pope_full", "gqa"], offline=True, output=tmp_path / "out", settings=settings)
    assert [row.model.samples for row in result.tasks] == [12, 3]
    assert not result.failed_samples
    assert not no_network
    assert not huggingface_hub.constants.HF_HUB_OFFLINE  # only for as long as it lasts


def test_pictures_of_results_ask_no_network(prepared, no_network, monkeypatch):
    """Results may be a stranger's, and name any task: only data that are there are shown."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    found = pictures_of([("pope_adv", 0), ("pope_adv", 99), ("ai2d", 0)], None)
    assert found.keys() == {("pope_adv", 0)}
    assert len(found["pope_adv", 0]) == 1
    assert not no_network


def test_prepare_counts_what_is_there(prepared, llava):
    assert prepare(["pope_full", "gqa"], checkpoints=[llava]) == {
        "pope_adv": 4,
        "pope_pop": 4,
        "pope_random": 4,
        "gqa": 3,
    }
