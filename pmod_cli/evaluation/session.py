"""The work of one evaluation: every task with every model, and what is known after each."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmod_cli.devices import rank, world_size
from pmod_cli.evaluation import identity, paper
from pmod_cli.evaluation.catalogue import Tasks
from pmod_cli.evaluation.folder import OutputFolder
from pmod_cli.evaluation.harness import SEEDS, TaskRun, run_task
from pmod_cli.evaluation.metrics import metric_of
from pmod_cli.evaluation.options import EvalSettings, Progress, document_limit
from pmod_cli.evaluation.processes import computed_once, gather
from pmod_cli.evaluation.results import EvalResult, TaskResult, compare, sample_rows, score_task

if TYPE_CHECKING:
    from pmod_cli.evaluation.adapter import PmodLmms
    from pmod_cli.evaluation.store import AnswerStore
    from pmod_cli.generation import VisionLanguageModel


class Evaluation:
    """The state of one call of `evaluate`.

    Args:
        sources: By role, ``baseline`` (if any) first.
        leaves: The tasks behind each requested name.
        catalogue: Where they come from.
        loaded: lmms-eval's task objects, with their data.
        settings: How to evaluate.
        folder: Where answers and results go.
        keep: Whether results are written there, and not only answers.
        progress: Called after each batch.
    """

    def __init__(
        self,
        sources: dict[str, str | Path | VisionLanguageModel],
        leaves: dict[str, list[str]],
        catalogue: Tasks,
        loaded: dict[str, Any],
        settings: EvalSettings,
        folder: OutputFolder,
        keep: bool,
        progress: Progress | None,
    ) -> None:
        self.sources = sources
        self.leaves = leaves
        self.catalogue = catalogue
        self.loaded = loaded
        self.settings = settings
        self.folder = folder
        self.keep = keep
        self.progress = progress
        self.configs = {leaf: catalogue.config(leaf) for leaf in loaded}
        self.models = {
            role: computed_once(lambda source=source: identity.describe(source))  # type: ignore[misc]
            for role, source in sources.items()
        }
        self.runs: dict[str, dict[str, TaskRun]] = {role: {} for role in sources}
        self.scored: dict[str, TaskResult] = {}
        self.environment = identity.environment() | {"seeds": SEEDS, "processes": world_size()}
        self.started = datetime.now(timezone.utc)
        self.clock = time.perf_counter()

    def run(self, force: bool) -> EvalResult:
        """All tasks with the baseline, then all with the model: one of them is in memory at a time."""
        if self.keep and not force:
            self.folder.claim(self.models)
        for role, source in self.sources.items():
            lm = _load(source, self.settings)
            for task in self.loaded.values():
                self._run_task(lm, role, task, force)
            if rank() == 0:
                lm.measure_gain()
                self._describe(role, lm)
            del lm
        result = self.result()
        if self.keep and rank() == 0:
            self.folder.write_results(result)
        return result

    def _run_task(self, lm: PmodLmms, role: str, task: Any, fresh: bool) -> None:
        leaf = task.config.task
        total = len(task.eval_docs)
        limit = document_limit(leaf, self.settings.limit, total)
        done = 0

        def answered(count: int) -> None:
            nonlocal done
            done += count
            if self.progress:
                self.progress(role, leaf, done, -(-(limit or total) // world_size()))

        lm.on_answers = answered
        lm.store = self._store(lm, role, task, fresh)
        run = run_task(lm, self.catalogue, task, limit=limit, output=self.folder.path)
        self._describe(role, lm, gather([lm.generated, lm.recalled, lm.seconds]))
        if run is None:
            return
        self.runs[role][leaf] = run
        if self.keep:
            metric = metric_of(leaf, self.configs[leaf], run.metrics)
            rows = {r: sample_rows(done[leaf], metric) for r, done in self.runs.items() if leaf in done}
            self.folder.write_samples(leaf, rows)
            self.folder.write_results(self.result())

    def _store(self, lm: PmodLmms, role: str, task: Any, fresh: bool) -> AnswerStore | None:
        """Where this model's answers to this task are kept; a model in memory has no fingerprint to keep them by."""
        fingerprint = self.models[role]["fingerprint"]
        if not fingerprint:
            return None
        conditions = {
            "checkpoint": fingerprint,
            "task": self._describe_task(task),
            "max_new_tokens": self.settings.max_new_tokens,
            "packages": identity.environment(),
        }
        key = identity.digest([conditions, lm.conditions()])
        try:
            return self.folder.store(key, task.config.task, rank(), fresh, world_size())
        except OSError:
            if self.keep:
                raise
            return None  # a cache that cannot be written is no reason not to evaluate

    def _describe(self, role: str, lm: PmodLmms, work: list[list[float]] | None = None) -> None:
        self.models[role] |= lm.info()
        if work:
            generated, recalled, seconds = zip(*work, strict=True)
            self.models[role]["answers"] = {
                "generated": sum(generated),
                "recalled": sum(recalled),
                "seconds": round(max(seconds), 3),
                "per_second": round(sum(generated) / max(seconds), 3) if sum(generated) else None,
            }

    @staticmethod
    def _describe_task(task: Any) -> dict[str, Any]:
        return {
            "version": task.VERSION,
            "generation": task.config.generation_kwargs,
            "data": identity.data_of(task),
        }

    def _score(self, name: str, group: list[str]) -> TaskResult:
        scores = {
            role: score_task([done[leaf] for leaf in group], [self.configs[leaf] for leaf in group])
            for role, done in self.runs.items()
        }
        (score, metric), (other, _) = scores["model"], scores.get("baseline", (None, None))
        key, scale = (metric.key, metric.scale) if metric else ("none", 1.0)
        return TaskResult(name, group, key, scale, score, other, compare(score, other))

    def result(self) -> EvalResult:
        """What is known by now."""
        for name, group in self.leaves.items():
            if name not in self.scored and all(leaf in self.runs["model"] for leaf in group):
                self.scored[name] = self._score(name, group)
        tasks = [self.scored[name] for name in self.leaves if name in self.scored]
        failures, broken_metrics = (
            {
                role: {leaf: errors for leaf, run in done.items() if (errors := errors_of(run))}
                for role, done in self.runs.items()
            }
            for errors_of in (_failures, lambda run: run.broken_metrics)
        )
        result = EvalResult(
            tasks=tasks,
            complete=len(tasks) == len(self.leaves),
            model=self.models["model"],
            baseline=self.models.get("baseline"),
            environment=self.environment,
            settings=vars(self.settings) | {"include_path": self.catalogue.folders},
            task_info={leaf: self._describe_task(task) for leaf, task in self.loaded.items()},
            failures=failures,
            broken_metrics=broken_metrics,
            started=self.started.isoformat(timespec="seconds"),
            seconds=time.perf_counter() - self.clock,
        )
        return replace(result, paper=paper.tables(result))


def _failures(run: TaskRun) -> dict[str, str]:
    return {str(doc): error for doc, error in run.failures.items()}


def _load(source: str | Path | VisionLanguageModel, settings: EvalSettings) -> PmodLmms:
    from pmod_cli.evaluation.adapter import PmodLmms

    return PmodLmms(
        str(identity.checkpoint_folder(source)) if isinstance(source, (str, Path)) else source,
        **{name: value for name, value in vars(settings).items() if name != "limit"},
        raise_failures=False,
    )
