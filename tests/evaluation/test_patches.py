"""What `pmod_cli.evaluation.patches` changes is still in lmms-eval. Where it is not, look at the patch again."""

from __future__ import annotations

import inspect
from importlib.metadata import version

import pytest
from packaging.specifiers import SpecifierSet

from pmod_cli.evaluation import patches
from pmod_cli.evaluation.catalogue import Tasks, import_lmms_eval
from tests.common.paper_fixtures import Fixtures


@pytest.fixture(scope="module", autouse=True)
def _imported():
    import_lmms_eval()


def test_the_version_is_one_that_the_patches_are_for():
    assert version("lmms-eval") in SpecifierSet(">=0.7.3,<0.8")


def test_lmms_eval_still_logs_to_stdout_draws_bars_and_fills_up_pictures():
    from lmms_eval import __main__, evaluator
    from lmms_eval.api import task
    from PIL import ImageFile

    assert "eval_logger.add(sys.stdout" in inspect.getsource(__main__)
    for module in (evaluator, task):
        assert "from tqdm import tqdm" in inspect.getsource(module)
        assert list(module.tqdm([1])) == [1]
    assert "ImageFile.LOAD_TRUNCATED_IMAGES = True" in inspect.getsource(task)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_scoring_is_still_retried_and_called_like_this():
    from lmms_eval.api.task import ConfigurableTask

    scoring = ConfigurableTask.process_results
    assert hasattr(scoring, "retry")
    assert list(inspect.signature(scoring.__wrapped__).parameters)[:3] == ["self", "doc", "results"]


def test_a_task_has_what_is_guarded_and_gets_it_back(tmp_path):
    fixtures = Fixtures(tmp_path / "fixtures")
    task = Tasks(["gqa"], [fixtures.include]).load("gqa")
    before = dict(task._aggregation_list)
    assert before
    broken: dict[str, str] = {}
    with patches.guarded(task, broken):
        assert task._aggregation_list.keys() == before.keys()
        assert task._aggregation_list != before
        assert task.aggregation() is task._aggregation_list
        assert list(task.process_results({}, [])) == [patches.SCORING_ERROR]
        assert task._aggregation_list["exact_match"](None) is None
        assert list(broken) == ["exact_match"]
    assert task._aggregation_list == before
    assert "process_results" not in vars(task)


def test_mmbench_still_draws_a_letter_where_the_judge_gives_none():
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    source = inspect.getsource(MMBench_Evaluator.extract_answer_from_item)
    assert "Failed to predict" in source
    assert "randomly generate one" in source
