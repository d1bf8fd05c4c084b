"""Every change to lmms-eval's own code, each with its reason. They hold for lmms-eval >= 0.7.3, < 0.8.

``tests/evaluation/test_patches.py`` fails where lmms-eval no longer has what they change.
"""

from __future__ import annotations

import contextlib
import functools
import json
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

from pmod_cli.evaluation.blame import told
from pmod_cli.evaluation.metrics import METRICS
from pmod_cli.evaluation.scoring_code import scoring_code
from pmod_cli.evaluation.watch import Watch
from pmod_cli.pictures import refuse_cut_pictures

SCORING_ERROR = "pmod_error"
"""Metric under which a document's scoring error is logged."""

SCORING_DOUBT = "pmod_doubt"
"""Metric under which is logged what `Watch.doubt` tells of a document."""


def quiet() -> None:
    """Keep lmms-eval's log and progress bars off stdout, and let broken pictures raise."""
    import lmms_eval.evaluator
    from loguru import logger
    from tqdm import tqdm  # type: ignore[import-untyped]  # ships no types

    # lmms-eval points loguru at stdout, where only results belong.
    logger.remove()
    logger.add(sys.stderr, level="ERROR")
    # One progress bar is enough, and it is ours.
    silent = functools.partial(tqdm, disable=True)
    lmms_eval.evaluator.tqdm = lmms_eval.api.task.tqdm = silent
    refuse_cut_pictures()


@contextlib.contextmanager
def guarded(task: Any, broken_metrics: dict[str, str]) -> Iterator[None]:
    """Let no exception in a task's scoring end the run, and no guess depend on the order of the documents.

    ``broken_metrics`` receives the error of each metric whose aggregation raises.
    """
    # Without lmms-eval's retries: five attempts two seconds apart, at a function that will raise again.
    score = getattr(type(task).process_results, "__wrapped__", type(task).process_results)
    # MMMU's metric is defined with guesses.
    code = scoring_code([task.config.process_results, *task._aggregation_list.values()])
    watch = Watch(code.functions, guesses=task.config.task in METRICS)

    def process_results(doc: dict[str, Any], results: list[Any], **options: Any) -> dict[str, Any]:
        # MMMU guesses a letter if it finds none: give each document its own guess, whatever came before.
        random.seed(json.dumps(doc, sort_keys=True, default=lambda value: type(value).__name__))
        watch.take()
        try:
            scored = score(task, doc, results, **options)
        except Exception as error:
            return {SCORING_ERROR: f"scoring raised {told(error)}"}
        doubt, trouble = watch.doubt, watch.take()
        if trouble:
            return {SCORING_ERROR: trouble}
        return {**scored, SCORING_DOUBT: doubt} if doubt else scored

    def guard(metric: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)  # lmms-eval looks at the signature
        def aggregate(*args: Any, **options: Any) -> Any:
            watch.take()
            try:
                value = function(*args, **options)
            except Exception as error:
                broken_metrics[metric] = f"aggregation raised {told(error)}"
                return None
            if trouble := watch.take():
                broken_metrics[metric] = trouble
                return None
            return value

        return aggregate

    aggregations = dict(task._aggregation_list)
    task.process_results = process_results
    task._aggregation_list |= {metric: guard(metric, function) for metric, function in aggregations.items()}
    try:
        with (
            watch.on(),
            _no_random_letters() if task.config.task.startswith("mmbench") else contextlib.nullcontext(),
        ):
            yield
    finally:
        del task.process_results
        task._aggregation_list |= aggregations


@contextlib.contextmanager
def _no_random_letters() -> Iterator[None]:
    """Where MMBench's paid judge gives no answer, lmms-eval draws a letter: let it raise instead."""
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    original = MMBench_Evaluator.extract_answer_from_item

    def extract_answer_from_item(self: Any, item: Any) -> Any:
        letter, said = original(self, item)
        if said.startswith("Failed to predict"):
            raise RuntimeError(f"the judge gave no letter for question {item['index']}")
        return letter, said

    MMBench_Evaluator.extract_answer_from_item = extract_answer_from_item
    try:
        yield
    finally:
        MMBench_Evaluator.extract_answer_from_item = original
