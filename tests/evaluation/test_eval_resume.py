"""Nothing is lost: what was answered is kept, whatever happens, and taken for nothing else."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from pmod_cli.evaluation import identity
from pmod_cli.evaluation.evaluate import evaluate
from pmod_cli.evaluation.folder import AnswerStore
from pmod_cli.evaluation.options import EvalSettings
from pmod_cli.evaluation.tasks import write_task
from pmod_cli.generation import Answer, VisionLanguageModel
from pmod_cli.output.errors import PmodError
from tests.common.eval_models import write_questions

SETTINGS = EvalSettings(max_new_tokens=3, batch_size=5)


@pytest.fixture(scope="module")
def finished(llava, local_task, tmp_path_factory):
    """The output folder of a finished evaluation, and its result."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    return folder, evaluate(llava, ["local_qa"], include_path=local_task, output=folder, settings=SETTINGS)


def rerun(finished, tmp_path, model, local_task, settings=SETTINGS, **options):
    """Evaluate again in a copy of the finished folder; how many samples were generated, how many recalled."""
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    result = evaluate(
        model, ["local_qa"], include_path=local_task, output=folder, settings=settings, **options
    )
    return result.model["answers"]["generated"], result.model["answers"]["recalled"]


def test_a_rerun_answers_nothing_again(finished, tmp_path, llava, local_task):
    assert finished[1].model["answers"]["generated"] == 12
    assert rerun(finished, tmp_path, llava, local_task) == (0, 12)


def test_the_batch_size_does_not_matter_to_what_is_kept(finished, tmp_path, llava, local_task):
    assert rerun(finished, tmp_path, llava, local_task, replace(SETTINGS, batch_size=2)) == (0, 12)


def test_a_checkpoint_is_known_by_its_content_wherever_it_lies(finished, tmp_path, llava, local_task):
    moved = shutil.copytree(llava, tmp_path / "elsewhere")
    assert rerun(finished, tmp_path, moved, local_task) == (0, 12)


def test_other_generation_settings_are_answered_anew(finished, tmp_path, llava, local_task):
    assert rerun(finished, tmp_path, llava, local_task, replace(SETTINGS, max_new_tokens=2)) == (12, 0)


def test_other_weights_under_the_same_name_are_refused_then_answered_anew(
    finished, tmp_path, other_llava, local_task
):
    with pytest.raises(PmodError, match="results of another model"):
        rerun(finished, tmp_path, other_llava, local_task)
    shutil.rmtree(tmp_path / "copy")
    assert rerun(finished, tmp_path, other_llava, local_task, force=True) == (12, 0)


def test_force_forgets_what_was_kept(finished, tmp_path, llava, local_task):
    assert rerun(finished, tmp_path, llava, local_task, force=True) == (12, 0)


def test_another_version_of_the_task_is_answered_anew(finished, tmp_path, llava, local_task):
    newer = tmp_path / "newer"
    newer.mkdir()
    text = (local_task / "local_qa.yaml").read_text()
    (newer / "local_qa.yaml").write_text(text.replace("version: 1.0", "version: 2.0"))
    assert rerun(finished, tmp_path, llava, newer) == (12, 0)


def test_other_data_are_answered_anew(finished, tmp_path, llava):
    data = write_questions(tmp_path / "data", ["red"] * 12, seed=9)
    write_task(tmp_path / "yaml", "local_qa", data, ["colour", "shape"])
    assert rerun(finished, tmp_path, llava, tmp_path / "yaml") == (12, 0)


def test_a_longer_limit_only_adds(llava, local_task, tmp_path):
    for limit, expected in ((4, (4, 0)), (9, (5, 4))):
        settings = replace(SETTINGS, limit=limit)
        result = evaluate(llava, ["local_qa"], include_path=local_task, output=tmp_path, settings=settings)
        assert (result.model["answers"]["generated"], result.model["answers"]["recalled"]) == expected


def test_without_an_output_folder_answers_are_kept_in_the_cache(llava, local_task, tmp_path, monkeypatch):
    monkeypatch.setenv("PMOD_CACHE", str(tmp_path))
    counts = []
    for _ in range(2):
        result = evaluate(llava, ["local_qa"], include_path=local_task, settings=SETTINGS)
        counts.append(result.model["answers"]["recalled"])
    assert counts == [0, 12]
    monkeypatch.setenv("PMOD_CACHE", "/proc/nowhere")
    assert not evaluate(llava, ["local_qa"], include_path=local_task, settings=SETTINGS).failed_samples


KILLED = """
import os, signal, sys
from pmod_cli.cli import main
from pmod_cli.generation import VisionLanguageModel

generate, batches = VisionLanguageModel.generate, []

def deadly(self, prompts, **settings):
    answers = generate(self, prompts, **settings)
    batches.append(len(prompts))
    if len(batches) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return answers

VisionLanguageModel.generate = deadly
main(sys.argv[1:])
"""


def test_kill_9_costs_at_most_one_batch(llava, local_task, tmp_path):
    """``pmod eval`` in a process of its own is killed by SIGKILL once its third batch is answered, not yet written."""

    def run():
        return evaluate(
            llava, ["local_qa"], include_path=local_task, output=tmp_path / "out", settings=SETTINGS
        )

    run_whole = evaluate(llava, ["local_qa"], include_path=local_task, settings=SETTINGS)
    arguments = [
        "eval",
        llava,
        "--tasks",
        "local_qa",
        "--include-path",
        local_task,
        "--output",
        tmp_path / "out",
    ]
    how = ["--batch-size", 5, "--max-new-tokens", 3]
    command = [sys.executable, "-c", KILLED, *map(str, [*arguments, *how])]
    died = subprocess.run(command, capture_output=True, check=False, timeout=200)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    [kept] = (tmp_path / "out" / "answers").rglob("rank0.jsonl")
    assert len(kept.read_text().splitlines()) == 10
    with kept.open("a") as file:
        file.write('{"doc_id": 3, "prom')  # as if it had been killed while writing
    result = run()
    assert (result.model["answers"]["generated"], result.model["answers"]["recalled"]) == (2, 10)
    assert result.tasks[0].to_dict() == run_whole.tasks[0].to_dict()
    assert len((tmp_path / "out" / "samples" / "local_qa.jsonl").read_text().splitlines()) == 12


def test_a_failed_sample_is_tried_again(llava, local_task, tmp_path, monkeypatch):
    encode = VisionLanguageModel.encode

    def sometimes(self, prompts):
        if any("picture 7?" in prompt.text for prompt in prompts):
            raise RuntimeError("a bad moment")
        return encode(self, prompts)

    def run():
        return evaluate(llava, ["local_qa"], include_path=local_task, output=tmp_path, settings=SETTINGS)

    with monkeypatch.context() as patch:
        patch.setattr(VisionLanguageModel, "encode", sometimes)
        result = run()
    [(document, failure)] = result.failures["model"]["local_qa"].items()
    assert document == "7"
    assert failure.startswith(f"RuntimeError: a bad moment ({__file__}, line ")
    rows = [json.loads(line) for line in (tmp_path / "samples" / "local_qa.jsonl").read_text().splitlines()]
    assert rows[7]["model"] == {
        "answer": None,
        "score": None,
        "error": failure,
        "tokens": None,
    }
    assert json.loads((tmp_path / "results.json").read_text())["failed_samples"] == 1
    result = run()
    assert not result.failed_samples
    assert result.model["answers"] | {"seconds": 0, "per_second": 0} == {
        "generated": 1,
        "recalled": 11,
        "seconds": 0,
        "per_second": 0,
    }


def test_the_store_survives_torn_and_foreign_lines(tmp_path):
    store = AnswerStore(tmp_path)
    store.add([(1, "a", Answer("x", 3, 1)), (2, "b", Answer("y\nz", 4, 2))])
    (tmp_path / "rank7.jsonl").write_text('not json\n{"doc_id": 5}\n[]\n')
    with (tmp_path / "rank0.jsonl").open("a") as file:
        file.write('{"doc_id": 3, "prompt": "')
    again = AnswerStore(tmp_path)
    assert len(again) == 2
    assert again.get(2, "b") == Answer("y\nz", 4, 2)
    assert again.get(2, "another prompt") is None
    again.add([(3, "c", Answer("w", 1, 1))])
    assert len(AnswerStore(tmp_path)) == 3


def test_a_fresh_store_forgets_what_more_processes_kept(tmp_path):
    for rank in range(4):
        AnswerStore(tmp_path, rank).add([(rank, "a", Answer("x", 3, 1))])
    stores = [AnswerStore(tmp_path, rank, fresh=True, processes=2) for rank in range(2)]
    stores[0].add([(0, "a", Answer("y", 3, 1))])
    again = AnswerStore(tmp_path)
    assert len(again) == 1
    assert again.get(0, "a") == Answer("y", 3, 1)


def test_the_fingerprint_is_that_of_the_content(llava, tmp_path):
    copy = shutil.copytree(llava, tmp_path / "copy")
    assert identity.fingerprint(copy) == identity.fingerprint(llava)
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert identity.fingerprint(copy) != identity.fingerprint(llava)
