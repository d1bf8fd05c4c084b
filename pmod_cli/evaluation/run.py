"""A whole evaluation: one model, or a model and its baseline, on any of lmms-eval's tasks."""

from __future__ import annotations

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
from pmod_cli.evaluation import identity
from pmod_cli.evaluation.harness import SEEDS, TaskRun, Tasks, run_task
from pmod_cli.evaluation.results import EvalResult, TaskResult, compare, score_task

if TYPE_CHECKING:
    from pmod_cli.evaluation.adapter import PmodLmms

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
    model: str | Path,
    tasks: Sequence[str],
    *,
    baseline: str | Path | None = None,
    include_path: str | Path | Sequence[str | Path] | None = None,
    output: str | Path | None = None,
    settings: EvalSettings | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> EvalResult:
    """Evaluate a checkpoint, dense or p-MoD, through lmms-eval.

    Args:
        model: Folder or hub id.
        tasks: Names of lmms-eval tasks, groups or tags.
        baseline: A second checkpoint, evaluated the same way for comparison.
        include_path: Folders with more task YAML.
        output: Where answers and results go; what is there already is not computed again. Without it nothing is kept.
        settings: How to evaluate.
        progress: Called after each batch.
        options: Fields of `EvalSettings`, in its place.

    Returns:
        The result; look at its ``failed_samples``.

    Raises:
        PmodError: Unknown task, missing data, or a checkpoint that cannot be loaded.
    """
    settings = settings or EvalSettings(**options)
    started = time.perf_counter()
    names = list(dict.fromkeys(tasks))
    if not names:
        raise PmodError("no task to evaluate", "e.g. --tasks gqa,pope_full")
    paths = [include_path] if isinstance(include_path, (str, Path)) else list(include_path or ())
    catalogue = Tasks(names, paths)
    leaves = {name: catalogue.leaves(name) for name in names}
    sources = {"model": str(model)} | ({"baseline": str(baseline)} if baseline else {})

    runs: dict[str, dict[str, TaskRun]] = {}
    described: dict[str, dict[str, Any]] = {}
    loaded: dict[str, Any] = {}
    with ExitStack() as stack:
        folder = Path(output) if output else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        # The baseline first: what takes long to find wrong is more often the model at hand, seen with its rival.
        for role in sorted(sources):
            lm = _load(sources[role], settings)
            described[role] = identity.describe(sources[role]) | lm.info()
            runs[role] = {}
            for leaf in dict.fromkeys(leaf for group in leaves.values() for leaf in group):
                if leaf not in loaded:
                    loaded[leaf] = catalogue.load(leaf)
                run = _run(lm, catalogue, loaded[leaf], role, settings, folder, progress)
                if run is not None:
                    runs[role][leaf] = run
            described[role] |= lm.info()
            del lm
    results = []
    for name, group in leaves.items():
        configs = [catalogue.config(leaf) for leaf in group]
        scores = {role: score_task([done[leaf] for leaf in group], configs) for role, done in runs.items()}
        (score, metric), (other, _) = scores["model"], scores.get("baseline", (None, None))
        results.append(
            TaskResult(
                name=name,
                tasks=group,
                metric=metric.key if metric else "none",
                model=score,
                baseline=other,
                difference=compare(score, other),
            )
        )
    return EvalResult(
        tasks=results,
        model=described["model"],
        baseline=described.get("baseline"),
        environment=identity.environment() | {"seeds": SEEDS},
        settings=vars(settings),
        failures={
            role: {
                leaf: {str(k): v for k, v in run.failures.items()}
                for leaf, run in done.items()
                if run.failures
            }
            for role, done in runs.items()
        },
        seconds=time.perf_counter() - started,
    )


def _load(source: str, settings: EvalSettings) -> PmodLmms:
    from pmod_cli.evaluation.adapter import PmodLmms

    return PmodLmms(
        source,
        batch_size=settings.batch_size,
        device=settings.device,
        dtype=settings.dtype,
        attn_implementation=settings.attn_implementation,
        image_backend=settings.image_backend,
        max_new_tokens=settings.max_new_tokens,
        raise_failures=False,
    )


def _run(
    lm: PmodLmms,
    catalogue: Tasks,
    task: Any,
    role: str,
    settings: EvalSettings,
    folder: Path,
    progress: Progress | None,
) -> TaskRun | None:
    name = task.config.task
    total = len(task.eval_docs)
    limit = document_limit(name, settings.limit, total)
    done = 0

    def answered(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(role, name, done, limit or total)

    lm.on_answers = answered
    return run_task(lm, catalogue, task, limit=limit, output=folder, rank=int(os.environ.get("RANK", 0)))


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
