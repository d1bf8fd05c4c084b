"""One pass of a model over one task, through lmms-eval's evaluator."""

from __future__ import annotations

import contextlib
import math
import numbers
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmod_cli.devices import gather
from pmod_cli.evaluation.catalogue import Tasks
from pmod_cli.evaluation.metrics import Metric, metric_of, sample_score
from pmod_cli.evaluation.patches import SCORING_DOUBT, SCORING_ERROR, guarded

if TYPE_CHECKING:
    from pmod_cli.evaluation.adapter import PmodLmms

SEEDS = {"random_seed": 0, "numpy_random_seed": 1234, "torch_random_seed": 1234, "fewshot_random_seed": 1234}
"""lmms-eval's defaults, written down because a report has to name them."""


@dataclass
class TaskRun:
    """What one pass of a model over one task gave.

    Attributes:
        task: Name of the task.
        metric: How it is scored; None if it has no number at all.
        metrics: ``metric,filter`` to aggregated value, as lmms-eval names them; only numbers.
        samples: One dictionary per document, in order: ``doc_id``, ``doc`` (no pictures), ``target``, ``prompt``,
            ``answer`` (a list where the task repeats its questions), ``tokens``, ``metrics``, ``score``, and ``error``
            (None unless it failed).
        broken_metrics: Errors by metric whose aggregation raised; not always one that matters.
    """

    task: str
    metric: Metric | None
    metrics: dict[str, float]
    samples: list[dict[str, Any]]
    broken_metrics: dict[str, str] = field(default_factory=dict)

    @property
    def points(self) -> float | None:
        """Its score, as lmms-eval aggregated it; None if there is none."""
        number = self.metrics.get(self.metric.key) if self.metric else None
        return None if self.metric is None or number is None else number * self.metric.scale

    @property
    def failures(self) -> dict[str, str]:
        """Errors by document."""
        return {str(sample["doc_id"]): sample["error"] for sample in self.samples if sample["error"]}


def run_task(lm: PmodLmms, tasks: Tasks, task: Any, *, limit: int | None, output: Path) -> TaskRun | None:
    """Evaluate a model on a task that is loaded; None on other ranks than 0.

    Into the folder ``output`` go the submission files that some tasks write, and what they print.
    """
    from lmms_eval import evaluator

    name = task.config.task
    broken_metrics: dict[str, str] = {}
    with (
        guarded(task, broken_metrics),
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
    failures = {key: error for part in gather(lm.failures) for key, error in part.items()}
    if results is None:
        return None
    metrics = {
        key: float(value)
        for key, value in sorted(results["results"][name].items())  # lmms-eval's order is another each time
        if "," in key and "_stderr" not in key and isinstance(value, numbers.Real) and math.isfinite(value)
    }
    config = tasks.config(name)
    metric = metric_of(name, config, metrics, broken_metrics)
    if metric is None or metric.key not in metrics:
        named = (
            ", ".join(str(entry.get("metric")) for entry in config.get("metric_list") or []) or "no metric"
        )
        broken_metrics.setdefault(
            "score",
            f"metric_list in {tasks.file(name)} names {named}, and process_results gives no number for it",
        )
    entries = sorted(results["samples"][name], key=lambda entry: entry["doc_id"])
    default = entries[0].get(SCORING_DOUBT) if all(SCORING_DOUBT in entry for entry in entries) else None
    samples = []
    for entry in entries:
        error = failures.get((name, entry["doc_id"])) or entry.get(SCORING_ERROR)
        error = error or (f"{default}, with every answer" if default else None)
        answer = entry["resps"][0]
        sample = {
            "doc_id": entry["doc_id"],
            "doc": entry["doc"],
            "target": entry["target"],
            "prompt": entry["arguments"][0],
            "answer": None
            if error
            else answer[0]
            if isinstance(answer, list) and len(answer) == 1
            else answer,
            "tokens": entry["token_counts"][0],
            "metrics": {key: entry[key] for key in task.aggregation() if key in entry},
            "error": error,
        }
        samples.append(sample | {"score": sample_score(metric, sample)})
    return TaskRun(name, metric, metrics, samples, broken_metrics)
