"""The paper's 14 tasks on fixtures, through lmms-eval's own prompts, parsing, metrics and aggregation."""

from __future__ import annotations

import pytest

from pmod_cli.evaluation import paper, stats
from pmod_cli.evaluation.evaluate import evaluate
from pmod_cli.evaluation.metrics import METRICS
from pmod_cli.evaluation.options import EvalSettings
from pmod_cli.generation import Answer, VisionLanguageModel
from tests.common.eval_models import score_of
from tests.common.paper_fixtures import MARKER, Fixtures

FULL_MARKS = dict.fromkeys(paper.TASKS, 100.0) | {"mme": 600.0}  # three perception categories in the fixtures


class FromKey(VisionLanguageModel):
    """Answers from a key by the question's marker; pictures and prompts go through the processor as ever."""

    def __init__(self, model, key):
        super().__init__(model.model, model.processor)
        self.key = key

    def generate(self, prompts, **settings):
        encoded = self.encode(prompts)
        assert len(encoded["input_ids"]) == len(prompts)
        return [Answer(self.key[int(MARKER.search(prompt.text)[1])], 1, 1) for prompt in prompts]


@pytest.fixture(scope="module")
def fixtures(tmp_path_factory):
    return Fixtures(tmp_path_factory.mktemp("paper") / "fixtures")


@pytest.fixture(scope="module")
def result(llava, fixtures):
    """A model that answers from the key, with one that answers wrongly as baseline."""
    model = VisionLanguageModel.load(llava)
    return evaluate(
        FromKey(model, fixtures.right),
        ["paper"],
        baseline=FromKey(model, fixtures.wrong),
        include_path=fixtures.include,
    )


def test_all_fourteen_are_evaluated(result):
    assert [task.name for task in result.tasks] == list(paper.TASKS)
    assert len(paper.TASKS) == 14
    assert {leaf for task in result.tasks for leaf in task.tasks} == METRICS.keys() - {paper.JUDGED}
    assert result.failed_samples == 0
    assert not any(result.broken_metrics.values())


@pytest.mark.parametrize("task", paper.TASKS)
def test_right_answers_get_full_marks_and_wrong_ones_none(result, task):
    [row] = [row for row in result.tasks if row.name == task]
    assert row.model.value == pytest.approx(FULL_MARKS[task])
    assert row.baseline.value == pytest.approx(0.0)


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_errors_belong_to_the_very_score_that_lmms_eval_gives(llava, fixtures, share):
    mixed = {
        number: (fixtures.right if (number * 7919) % 100 < share * 100 else fixtures.wrong)[number]
        for number in fixtures.right
    }
    model = FromKey(VisionLanguageModel.load(llava), mixed)
    result = evaluate(model, ["paper"], include_path=fixtures.include)
    partial = 0
    for task in result.tasks:
        # lmms-eval rounds MMMU's share to five digits.
        assert stats.score(task.model.strata) == pytest.approx(task.model.value, abs=1e-3), task.name
        partial += 0 < task.model.value < FULL_MARKS[task.name]
    assert partial >= 8


def test_the_judged_mmbench_replaces_the_static_one():
    assert paper.expand(["paper"]) == list(paper.TASKS)
    judged = paper.expand(["paper", "mmbench_en_dev"])
    assert judged == [paper.JUDGED if task == paper.STATIC else task for task in paper.TASKS]
    assert paper.expand(["gqa", "paper"])[0] == "gqa"
    assert len(paper.expand(["gqa", "paper"])) == 14


def test_a_judge_that_gives_no_letter_leaves_no_score(llava, fixtures, monkeypatch):
    """lmms-eval would draw a letter. Where letters can be read, the judge is not asked."""
    from lmms_eval.tasks.mmbench import mmbench_evals

    def refuse(*arguments):
        raise ConnectionError("no judge here")

    monkeypatch.setenv("OPENAI_API_KEY", "key")
    monkeypatch.setattr(mmbench_evals.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(mmbench_evals.MMBench_Evaluator, "_post_request", refuse)
    model = VisionLanguageModel.load(llava)
    readable = evaluate(FromKey(model, fixtures.right), ["mmbench_en_dev"], include_path=fixtures.include)
    assert score_of(readable, "mmbench_en_dev") == pytest.approx(100.0)
    unreadable = FromKey(model, dict.fromkeys(fixtures.right, "I cannot tell"))
    result = evaluate(unreadable, ["mmbench_en_dev"], include_path=fixtures.include)
    assert score_of(result, "mmbench_en_dev") is None
    assert "the judge gave no letter for question" in result.first_broken_metric


def test_tables_have_the_papers_columns_and_figures(result):
    first, second = paper.tables(result)
    assert list(first[0].values) == ["SEED", "RWQA", "MME", "MMB", "POPE", "GQA", "AI2D"]
    assert list(second[0].values) == ["DocVQA", "ChartQA", "TextVQA", "InfoVQA", "OK-VQA", "MMMU", "SQA"]
    # Both stand-ins are the dense model.
    labels = [
        "our baseline",
        "our model",
        "difference",
        "paper: baseline",
        "paper: p-MoD",
        "paper: difference",
    ]
    labels += ["ours - paper: baseline", "ours - paper: model"]
    assert [row.label for row in first] == labels
    assert first[3].values["MME"] == 1506.8
    assert second[4].values["OK-VQA"] == 56.0
    assert first[5].values["MMB"] == pytest.approx(1.3)
    assert first[2].values["GQA"] == pytest.approx(100.0)
    assert first[6].values["GQA"] == pytest.approx(0 - 61.9)
    assert first[7].values["GQA"] == pytest.approx(100 - 61.9)
    # MME out of 100: (66.2 + 55.6 + 75.34 + 64.1 + 85.9 + 61.9 + 55.2) / 7
    assert first[3].average == pytest.approx(66.32)


def test_a_group_that_lmms_eval_does_not_aggregate_is_the_mean_of_its_parts(llava, fixtures):
    """Only pope_adv's answers are right: a third of the full marks."""
    key = dict(fixtures.wrong)
    adversarial = sorted(fixtures.right)
    model = VisionLanguageModel.load(llava)
    alone = evaluate(FromKey(model, fixtures.right), ["pope_adv"], include_path=fixtures.include)
    numbers = _markers_of(fixtures, "pope_adv")
    assert score_of(alone, "pope_adv") == pytest.approx(100.0)
    key |= {number: fixtures.right[number] for number in numbers}
    assert set(numbers) < set(adversarial)
    result = evaluate(FromKey(model, key), ["pope_full"], include_path=fixtures.include)
    assert score_of(result, "pope_full") == pytest.approx(100 / 3)


def _markers_of(fixtures, task):
    import datasets

    rows = datasets.Dataset.from_parquet(str(fixtures.folder / f"{task}.parquet"))
    return [int(MARKER.search(question)[1]) for question in rows["question"]]


def test_an_odd_limit_does_not_break_mme(llava, fixtures):
    model = FromKey(VisionLanguageModel.load(llava), fixtures.right)
    result = evaluate(model, ["mme"], include_path=fixtures.include, settings=EvalSettings(limit=3))
    assert result.tasks[0].model.samples == 4
    assert score_of(result, "mme") == pytest.approx(200.0)
    assert not result.failed_samples


def test_a_fractional_limit_is_taken_of_each_task(llava, fixtures):
    model = FromKey(VisionLanguageModel.load(llava), fixtures.right)
    result = evaluate(
        model, ["gqa", "mme", "docvqa_val"], include_path=fixtures.include, settings=EvalSettings(limit=0.3)
    )
    assert [task.model.samples for task in result.tasks] == [1, 6, 1]


def test_nothing_is_written_to_the_working_directory(llava, fixtures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = FromKey(VisionLanguageModel.load(llava), fixtures.right)
    evaluate(model, ["textvqa_val", "mmbench_en_dev_static"], include_path=fixtures.include)
    assert list(tmp_path.iterdir()) == []


def test_a_guess_does_not_depend_on_what_came_before(llava, fixtures):
    """MMMU draws a letter where it finds none: the same one whichever documents are evaluated before."""
    key = dict.fromkeys(fixtures.right, "no letter at all")
    model = FromKey(VisionLanguageModel.load(llava), key)

    def guesses(tasks):
        result = evaluate(model, tasks, include_path=fixtures.include)
        return {task.name: task.model.value for task in result.tasks}["mmmu_val"]

    assert len({guesses(["mmmu_val"]), guesses(["mme", "mmmu_val"]), guesses(["gqa", "mmmu_val"])}) == 1
