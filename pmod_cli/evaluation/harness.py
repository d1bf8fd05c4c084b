"""One pass of a model over one task, through lmms-eval's evaluator; the version tried is 0.7.3."""

from __future__ import annotations

import contextlib
import functools
import json
import random
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmod_cli.evaluation.catalogue import Tasks
from pmod_cli.evaluation.processes import gather

if TYPE_CHECKING:
    from pmod_cli.evaluation.adapter import PmodLmms

SEEDS = {"random_seed": 0, "numpy_random_seed": 1234, "torch_random_seed": 1234, "fewshot_random_seed": 1234}
"""lmms-eval's defaults, written down because a report has to name them."""

_ERROR = "pmod_error"


@dataclass
class TaskRun:
    """What one pass of a model over one task gave.

    Attributes:
        task: Name of the task.
        metrics: ``metric,filter`` to aggregated value, as lmms-eval names them; only numbers.
        samples: One dictionary a document, in order: ``doc_id``, ``doc`` (no pictures), ``target``, ``prompt``,
            ``answer``, ``metrics``, and for a failed one ``error``.
        failures: Errors by document.
        broken_metrics: Errors by metric whose aggregation raised; not always one that matters.
        seconds: Wall time.
    """

    task: str
    metrics: dict[str, float]
    samples: list[dict[str, Any]]
    failures: dict[int, str] = field(default_factory=dict)
    broken_metrics: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def run_task(lm: PmodLmms, tasks: Tasks, task: Any, *, limit: int | None, output: Path) -> TaskRun | None:
    """Evaluate a model on one loaded task.

    Args:
        lm: The model; its ``failures`` say which samples raised.
        tasks: Where the task comes from.
        task: The task.
        limit: Only the first so many documents.
        output: Folder for the submission files that some tasks write, and for what they print.

    Returns:
        The run on rank 0, None elsewhere.
    """
    from lmms_eval import evaluator

    name = task.config.task
    started = time.perf_counter()
    broken_metrics: dict[str, str] = {}
    with (
        _guarded(task, broken_metrics),
        _no_random_letters(name),
        (output / "lmms-eval.log").open("a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
    ):
        results = evaluator.simple_evaluate(
            model=lm,
            tasks=[task],
            task_manager=tasks.manager,
            limit=limit,
            bootstrap_iters=0,  # its bootstrap is not paired; ours is in stats.py
            log_samples=True,
            process_docs_parallel=1,  # metrics that guess draw from one global random state
            cli_args=Namespace(output_path=str(output), process_with_media=False, reasoning_tags=None),
            **SEEDS,
        )
    own = {doc_id: error for (task_name, doc_id), error in lm.failures.items() if task_name == name}
    failures: dict[int, str] = {}
    for part in gather(own):
        failures |= part
    if results is None:
        return None
    samples = [_sample(entry, failures) for entry in results["samples"][name]]
    samples.sort(key=lambda sample: sample["doc_id"])
    failures |= {sample["doc_id"]: sample["error"] for sample in samples if sample["error"]}
    numbers = {
        key: float(value)
        for key, value in sorted(results["results"][name].items())  # lmms-eval's order is another each time
        if "," in key and "_stderr" not in key and _is_number(value)
    }
    return TaskRun(name, numbers, samples, failures, broken_metrics, time.perf_counter() - started)


@contextlib.contextmanager
def _guarded(task: Any, broken_metrics: dict[str, str]) -> Iterator[None]:
    """Let no exception in a task's scoring end the run, and no guess depend on the order of the documents."""
    task.process_results = _guard_document(task)
    aggregations = dict(task._aggregation_list)
    for metric, function in aggregations.items():
        task._aggregation_list[metric] = _guard_aggregation(metric, function, broken_metrics)
    try:
        yield
    finally:
        del task.process_results
        task._aggregation_list.update(aggregations)


@contextlib.contextmanager
def _no_random_letters(task: str) -> Iterator[None]:
    """Where MMBench's paid judge gives no answer, lmms-eval draws a letter: let it raise instead."""
    if not task.startswith("mmbench"):
        yield
        return
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


def _guard_document(task: Any) -> Callable[..., dict[str, Any]]:
    # Without lmms-eval's retries: five attempts two seconds apart, at a function that will raise again.
    score = getattr(type(task).process_results, "__wrapped__", type(task).process_results)

    def process_results(doc: dict[str, Any], results: list[Any], **options: Any) -> dict[str, Any]:
        # MMMU guesses a letter if it finds none: give each document its own guess, whatever came before.
        random.seed(
            json.dumps({key: doc[key] for key in sorted(doc)}, default=lambda value: type(value).__name__)
        )
        try:
            return score(task, doc, results, **options)
        except Exception as error:
            return {_ERROR: f"scoring raised {type(error).__name__}: {error}"}

    return process_results


def _guard_aggregation(
    metric: str, function: Callable[..., Any], broken_metrics: dict[str, str]
) -> Callable[..., Any]:
    @functools.wraps(function)  # lmms-eval looks at the signature
    def aggregate(*args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        except Exception as error:
            broken_metrics[metric] = f"aggregation raised {type(error).__name__}: {error}"
            return None

    return aggregate


def _sample(entry: dict[str, Any], failures: dict[int, str]) -> dict[str, Any]:
    known = {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "token_counts", "doc_hash"}
    error = failures.get(entry["doc_id"]) or entry.get(_ERROR)
    answer = entry["resps"][0]
    return {
        "doc_id": entry["doc_id"],
        "doc": entry["doc"],
        "target": entry["target"],
        "prompt": entry["arguments"][0],
        "answer": None if error else answer[0] if isinstance(answer, list) else answer,
        "tokens": entry["token_counts"][0],
        "metrics": {key: entry[key] for key in entry.keys() - known - {"input_media", _ERROR}},
        "error": error,
    }


def _is_number(value: Any) -> bool:
    import numbers

    return isinstance(value, numbers.Real) and not isinstance(value, bool) and value == value
