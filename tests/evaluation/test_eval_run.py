"""Whole evaluations through lmms-eval's evaluator, on a local task."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest

from pmod_cli.evaluation.evaluate import evaluate
from pmod_cli.evaluation.options import EvalSettings, document_limit
from pmod_cli.evaluation.tasks import write_task
from pmod_cli.generation import VisionLanguageModel
from pmod_cli.output.errors import PmodError
from pmod_cli.prompts import Prompt
from tests.common.eval_models import score_of, write_questions

SETTINGS = EvalSettings(max_new_tokens=4, batch_size=5)


@pytest.fixture(scope="module")
def own_answers(llava, tmp_path_factory):
    """A task whose key holds what `llava` itself answers to its first 9 of 12 questions, in odd letter case."""
    import datasets

    folder = tmp_path_factory.mktemp("own")
    data = write_questions(folder / "data", ["?"] * 12, seed=3)
    model = VisionLanguageModel.load(llava)
    rows = datasets.Dataset.from_parquet(str(data / "test.parquet"))
    said = [
        model.generate([Prompt(row["question"], (row["image"],))], max_new_tokens=4)[0].text for row in rows
    ]
    keyed = rows.remove_columns("answer").add_column(
        "answer", [text + "." if index < 9 else "never" for index, text in enumerate(said)]
    )
    keyed.to_parquet(data / "test.parquet")
    write_task(folder / "yaml", "own_answers", data, ["colour", "shape"])
    return folder / "yaml"


def test_scores_overall_and_by_kind(llava, own_answers):
    result = evaluate(llava, ["own_answers"], include_path=own_answers, settings=SETTINGS)
    assert result.failed_samples == 0
    assert score_of(result, "own_answers") == pytest.approx(75.0)
    [task] = result.tasks
    # Kinds take turns: the three wrong ones are shape, colour, shape.
    assert task.model.metrics["own_answers"] == pytest.approx(
        {"exact_match,none": 0.75, "colour,none": 5 / 6, "shape,none": 4 / 6}
    )
    assert task.model.samples == 12


def test_another_model_does_not_know_these_answers(other_llava, own_answers):
    assert (
        score_of(
            evaluate(other_llava, ["own_answers"], include_path=own_answers, settings=SETTINGS), "own_answers"
        )
        < 30
    )


def test_a_limit_takes_the_first_documents(llava, own_answers):
    result = evaluate(llava, ["own_answers"], include_path=own_answers, settings=replace(SETTINGS, limit=10))
    assert score_of(result, "own_answers") == pytest.approx(90.0)


@pytest.mark.parametrize(
    ("task", "limit", "total", "expected"),
    [
        ("gqa", None, 100, None),
        ("gqa", 7, 100, 7),
        ("gqa", 0.25, 10, 3),
        ("gqa", 200, 100, None),
        ("mme", 7, 100, 8),
        ("mme", 0.05, 60, 4),
    ],
)
def test_limits(task, limit, total, expected):
    assert document_limit(task, limit, total) == expected


@pytest.mark.parametrize("limit", [0, -1, 1.5, math.nan, math.inf])
def test_bad_limits_are_refused(limit):
    with pytest.raises(PmodError, match="--limit"):
        document_limit("gqa", limit, 10)


def test_a_broken_picture_is_a_failure_and_hides_behind_no_score(llava, own_answers, tmp_path):
    import datasets

    data = write_questions(tmp_path / "data", ["x"] * 6)
    rows = datasets.Dataset.from_parquet(str(data / "test.parquet")).cast_column(
        "image", datasets.Image(decode=False)
    )

    def break_one(row, index):
        return {"image": {"bytes": b"not a picture" if index == 2 else row["image"]["bytes"], "path": None}}

    broken = rows.map(break_one, with_indices=True).cast_column("image", datasets.Image())
    broken.to_parquet(data / "test.parquet")
    # Loading a task looks at its first document only; the third comes to light when its turn comes.
    write_task(tmp_path / "yaml", "broken", data)
    result = evaluate(llava, ["broken"], include_path=tmp_path / "yaml", settings=SETTINGS)
    assert result.failed_samples == 1
    assert "cannot identify image file" in result.failures["model"]["broken"]["2"]
    assert score_of(result, "broken") is None
    assert "model, broken, 2" in result.first_failure


def test_scoring_that_raises_is_a_failure_of_its_sample(llava, tmp_path):
    data = write_questions(tmp_path / "data", ["x"] * 4)
    path = write_task(tmp_path / "yaml", "raises", data)
    path.write_text(path.read_text() + "process_results: !function bad.process_results\n")
    (tmp_path / "yaml" / "bad.py").write_text(
        "def process_results(doc, results):\n    return {'exact_match': 1 / int(doc['question_id'])}\n"
    )
    result = evaluate(llava, ["raises"], include_path=tmp_path / "yaml", settings=SETTINGS)
    [(document, failure)] = result.failures["model"]["raises"].items()
    place = re.escape(str(tmp_path / "yaml"))
    assert document == "0"
    assert re.fullmatch(
        rf"scoring raised ZeroDivisionError: division by zero \({place}/\w+.py, line \d+\)", failure
    )
    assert score_of(result, "raises") is None


@pytest.mark.parametrize("way", ["one picture, not a list", "in their places"])
def test_pictures_come_as_the_task_gives_them(llava, tmp_path, way):
    """A `doc_to_visual` may return a bare picture; its 16 bits and the places of ``<image>`` are kept."""
    import datasets
    import numpy as np
    from PIL import Image

    from pmod_cli.pictures import as_rgb

    ramp = Image.fromarray(np.linspace(0, 65535, 400).reshape(20, 20).astype(np.uint16))
    several = way == "in their places"
    asked = "Picture A: <image> Picture B: <image> Which?" if several else "What is it?"
    rows = [{"image": [ramp, ramp] if several else ramp, "question": asked, "answer": "?"}]
    feature = datasets.List(datasets.Image()) if several else datasets.Image()
    data = tmp_path / "data"
    data.mkdir()
    datasets.Dataset.from_list(rows).cast_column("image", feature).to_parquet(data / "test.parquet")
    write_task(tmp_path / "yaml", "pictures", data, ["colour"])
    visual = "[i.convert('RGB') for i in doc['image']]" if several else "doc['image'].convert('RGB')"
    (tmp_path / "yaml" / "visual.py").write_text(f"def visual(doc):\n    return {visual}\n")
    [task] = (tmp_path / "yaml").glob("*.yaml")
    lines = [line for line in task.read_text().splitlines() if not line.startswith("doc_to_visual")]
    task.write_text("\n".join([*lines, "doc_to_visual: !function visual.visual"]) + "\n")
    seen = []
    model = VisionLanguageModel.load(llava)
    generate = model.generate
    model.generate = lambda prompts, **settings: seen.extend(prompts) or generate(prompts, **settings)
    result = evaluate(model, ["pictures"], include_path=tmp_path / "yaml", settings=SETTINGS)
    assert result.failed_samples == 0
    [prompt] = seen
    assert len(prompt.images) == (2 if several else 1)
    assert all(np.array_equal(image, as_rgb(ramp)) for image in prompt.images)
    assert asked in model.render(prompt)
    assert model.render(prompt).count("<image>") == len(prompt.images)
