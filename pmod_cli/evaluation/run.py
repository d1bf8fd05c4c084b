"""A whole evaluation: one model, or a model and its baseline, on any of lmms-eval's tasks."""

from __future__ import annotations

import itertools
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmod_cli.errors import PmodError
from pmod_cli.evaluation import identity, paper, preflight, report
from pmod_cli.evaluation.batching import parse_batch_size
from pmod_cli.evaluation.folder import OutputFolder
from pmod_cli.evaluation.harness import SEEDS, TaskRun, Tasks, run_task
from pmod_cli.evaluation.metrics import metric_of
from pmod_cli.evaluation.results import EvalResult, TaskResult, compare, sample_rows, score_task
from pmod_cli.generation import check_source

if TYPE_CHECKING:
    from pmod_cli.evaluation.adapter import PmodLmms
    from pmod_cli.generation import VisionLanguageModel

Progress = Callable[[str, str, int, int], None]
"""Called with the role, the task, how many of its samples are answered, and how many there are."""


@dataclass(frozen=True)
class EvalSettings:
    """How to evaluate; all that both models share.

    Attributes:
        batch_size: A number or ``auto``.
        limit: Only the first so many documents of a task; below 1, that share of them.
        max_new_tokens: Upper limit on the tasks' own.
        dtype: See `VisionLanguageModel.load`.
        device: See `VisionLanguageModel.load`.
        image_backend: See `VisionLanguageModel.load`.
        attn_implementation: See `VisionLanguageModel.load`.
    """

    batch_size: int | str = "auto"
    limit: float | None = None
    max_new_tokens: int | None = None
    dtype: str = "auto"
    device: str | None = None
    image_backend: str = "pil"
    attn_implementation: str | None = None


def evaluate(
    model: str | Path | VisionLanguageModel,
    tasks: Sequence[str],
    *,
    baseline: str | Path | VisionLanguageModel | None = None,
    include_path: str | Path | Sequence[str | Path] | None = None,
    output: str | Path | None = None,
    force: bool = False,
    offline: bool = False,
    settings: EvalSettings | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> EvalResult:
    """Evaluate a checkpoint, dense or p-MoD, through lmms-eval.

    Args:
        model: Folder or hub id, or a model that is loaded already.
        tasks: Names of lmms-eval tasks, groups or tags; ``paper`` for the paper's 14.
        baseline: A second checkpoint, evaluated the same way for comparison.
        include_path: Folders with more task YAML.
        output: Where answers and results go; what is there already is not computed again. Without it nothing is kept.
        force: Replace the results of other models in ``output``.
        offline: Do not ask the network for anything.
        settings: How to evaluate.
        progress: Called after each batch.
        options: Fields of `EvalSettings`, in its place.

    Returns:
        The result; look at its ``failed_samples``. On other ranks than 0 it has no tasks.

    Raises:
        PmodError: Unknown task, missing data, or a checkpoint that cannot be loaded.
        PreflightError: If anything is missing that the tasks need.
    """
    paths = [include_path] if isinstance(include_path, (str, Path)) else list(include_path or ())
    names = paper.expand(list(tasks))
    if not names:
        raise PmodError("no task to evaluate", "e.g. --tasks gqa,pope_full")
    for source in (model, baseline):
        if isinstance(source, (str, Path)):
            check_source(source)
    catalogue = Tasks(names, paths)
    leaves = {name: catalogue.leaves(name) for name in names}
    settings = settings or EvalSettings(**options)
    try:
        parse_batch_size(settings.batch_size)
    except ValueError:
        raise PmodError(f"--batch-size {settings.batch_size}: give a positive number or auto") from None
    document_limit("", settings.limit, 1)
    preflight.check(catalogue, list(dict.fromkeys(itertools.chain(*leaves.values()))), offline=offline)
    with ExitStack() as stack:
        folder = OutputFolder(Path(output or stack.enter_context(tempfile.TemporaryDirectory())), rank())
        evaluation = _Evaluation(
            {"baseline": baseline, "model": model} if baseline is not None else {"model": model},
            leaves,
            catalogue,
            settings,
            folder,
            keep=output is not None,
            progress=progress,
        )
        return evaluation.run(force)


def prepare(tasks: Sequence[str], include_path: Sequence[str | Path] = ()) -> dict[str, int]:
    """Download the data of tasks ahead of time.

    Returns:
        Number of documents by task.

    Raises:
        PmodError: Unknown task, or data that cannot be had.
    """
    names = paper.expand(list(tasks))
    catalogue = Tasks(names, include_path)
    leaves = list(dict.fromkeys(itertools.chain(*(catalogue.leaves(name) for name in names))))
    preflight.check(catalogue, leaves, preparing=True)
    return {leaf: len(catalogue.load(leaf).eval_docs) for leaf in leaves}


class _Evaluation:
    """The state of one call of `evaluate`."""

    def __init__(
        self,
        sources: dict[str, str | Path | VisionLanguageModel],
        leaves: dict[str, list[str]],
        catalogue: Tasks,
        settings: EvalSettings,
        folder: OutputFolder,
        keep: bool,
        progress: Progress | None,
    ) -> None:
        self.sources = sources
        self.settings = settings
        self.catalogue = catalogue
        self.folder = folder
        self.keep = keep
        self.progress = progress
        self.leaves = leaves
        self.configs = {leaf: catalogue.config(leaf) for group in leaves.values() for leaf in group}
        self.models = {role: identity.describe(source) for role, source in sources.items()}
        self.runs: dict[str, dict[str, TaskRun]] = {role: {} for role in sources}
        self.environment = identity.environment() | {"seeds": SEEDS}
        self.started = time.perf_counter()

    def run(self, force: bool) -> EvalResult:
        """All tasks with the baseline, then all with the model: one of them is in memory at a time."""
        if self.keep and not force:
            self.folder.claim(self.models)
        loaded: dict[str, Any] = {}
        for role, source in self.sources.items():
            lm = _load(source, self.settings)
            for leaf in self.configs:
                if leaf not in loaded:
                    loaded[leaf] = self.catalogue.load(leaf)
                self._run_task(lm, role, loaded[leaf])
            del lm
        return self.result()

    def _run_task(self, lm: PmodLmms, role: str, task: Any) -> None:
        leaf = task.config.task
        total = len(task.eval_docs)
        limit = document_limit(leaf, self.settings.limit, total)
        done = 0

        def answered(count: int) -> None:
            nonlocal done
            done += count
            if self.progress:
                self.progress(role, leaf, done, limit or total)

        lm.on_answers = answered
        fingerprint = self.models[role]["fingerprint"]
        if self.keep and fingerprint:
            conditions = {
                "checkpoint": fingerprint,
                "task": leaf,
                "version": task.VERSION,
                "generation": task.config.generation_kwargs,
                "data": identity.data_of(task),
                "max_new_tokens": self.settings.max_new_tokens,
                "packages": self.environment,
            }
            lm.store = self.folder.store(identity.digest([conditions, lm.conditions()]), leaf, rank())
        run = run_task(lm, self.catalogue, task, limit=limit, output=self.folder.path)
        self.models[role] |= lm.info()
        if run is None:
            return
        self.runs[role][leaf] = run
        if self.keep:
            metric = metric_of(leaf, self.configs[leaf], run.metrics)
            rows = {r: sample_rows(done[leaf], metric) for r, done in self.runs.items() if leaf in done}
            self.folder.write_samples(leaf, rows)
            result = self.result()
            self.folder.write_results(result.to_dict(), report.markdown(result))

    def result(self) -> EvalResult:
        """What is known by now."""
        tasks = []
        for name, group in self.leaves.items():
            scores = {
                role: score_task([done[leaf] for leaf in group], [self.configs[leaf] for leaf in group])
                for role, done in self.runs.items()
                if all(leaf in done for leaf in group)
            }
            if "model" not in scores:
                continue
            (score, metric), (other, _) = scores["model"], scores.get("baseline", (None, None))
            key, scale = (metric.key, metric.scale) if metric else ("none", 1.0)
            tasks.append(TaskResult(name, group, key, scale, score, other, compare(score, other)))
        return EvalResult(
            tasks=tasks,
            complete=len(tasks) == len(self.leaves),
            model=self.models["model"],
            baseline=self.models.get("baseline"),
            environment=self.environment,
            settings=vars(self.settings) | {"include_path": self.catalogue.folders},
            failures={
                role: {
                    leaf: {str(doc): error for doc, error in run.failures.items()}
                    for leaf, run in done.items()
                }
                for role, done in self.runs.items()
            },
            broken_metrics={
                role: {leaf: run.broken_metrics for leaf, run in done.items() if run.broken_metrics}
                for role, done in self.runs.items()
            },
            seconds=time.perf_counter() - self.started,
        )


def rank() -> int:
    """This process's rank among those that ``torchrun`` or ``accelerate launch`` started."""
    return int(os.environ.get("RANK", 0))


def _load(source: str | Path | VisionLanguageModel, settings: EvalSettings) -> PmodLmms:
    from pmod_cli.evaluation.adapter import PmodLmms

    return PmodLmms(
        str(source) if isinstance(source, Path) else source,
        batch_size=settings.batch_size,
        device=settings.device,
        dtype=settings.dtype,
        attn_implementation=settings.attn_implementation,
        image_backend=settings.image_backend,
        max_new_tokens=settings.max_new_tokens,
        raise_failures=False,
    )


def document_limit(task: str, limit: float | None, total: int) -> int | None:
    """How many documents of a task to take, or None for all.

    MME counts questions in pairs that stand one after the other, so its limit is rounded up to an even number.

    Args:
        task: Name of the task.
        limit: What the user asked for; below 1, a share of the documents.
        total: How many there are.

    Raises:
        PmodError: If the limit is not positive, or neither a share nor whole.
    """
    if limit is None:
        return None
    if limit <= 0 or (limit >= 1 and limit != int(limit)):
        raise PmodError(f"--limit {limit}: give a whole number, or a share between 0 and 1")
    count = math.ceil(total * limit) if limit < 1 else int(limit)
    if task == "mme":
        count += count % 2
    return count if count < total else None
