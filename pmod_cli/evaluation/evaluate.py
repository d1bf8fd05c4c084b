"""A whole evaluation: one model, or a model and its baseline, on any of lmms-eval's tasks."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmod_cli.checkpoints.load import read_config
from pmod_cli.checkpoints.source import open_source
from pmod_cli.devices import gather, is_main_process, join, one_first, rank, world_size
from pmod_cli.evaluation import folder, identity, paper, requirements
from pmod_cli.evaluation.catalogue import Tasks, import_lmms_eval
from pmod_cli.evaluation.folder import AnswerStore
from pmod_cli.evaluation.harness import SEEDS, TaskRun, run_task
from pmod_cli.evaluation.options import EvalSettings, Progress, document_limit
from pmod_cli.evaluation.results import EvalResult, TaskResult
from pmod_cli.evaluation.visuals import refuse_unseen
from pmod_cli.families import find_family
from pmod_cli.output.files import locked, open_folder, remove_unused
from pmod_cli.output.paths import real_path

if TYPE_CHECKING:
    from pmod_cli.evaluation.adapter import PmodLmms
    from pmod_cli.generation import VisionLanguageModel


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
) -> EvalResult:
    """Evaluate a checkpoint, dense or p-MoD, through lmms-eval.

    Args:
        model: Folder or hub id, or a model that is loaded already.
        tasks: Names of lmms-eval tasks, groups or tags; ``paper`` for the paper's 14.
        baseline: A second checkpoint, evaluated the same way for comparison.
        include_path: Folders with more task YAML.
        output: Where answers and results go; answers that are there already are not computed again. Without it
            answers alone are kept, in the user's cache.
        force: Start over: forget answers that were kept, and replace the results of other models in ``output``.
        offline: Do not ask the network for anything.
        settings: How to evaluate.
        progress: Called after each batch.

    Returns:
        The result; look at its ``failed_samples``. On other ranks than 0 it has no tasks.

    Raises:
        MissingExtraError: lmms-eval is not installed.
        BrokenPackageError: lmms-eval cannot be imported.
        PmodError: A checkpoint that cannot be loaded, a bad setting, data that cannot be read.
        PreflightError: If anything is missing that the tasks need, found before a model is loaded.
    """
    import_lmms_eval()
    settings = settings or EvalSettings()
    settings.check()
    names = paper.expand(tasks)
    sources = {"baseline": baseline, "model": model} if baseline is not None else {"model": model}
    with ExitStack() as stack:
        stack.enter_context(requirements.offline_mode(offline))
        catalogue = Tasks(names, include_path, identity.task_name(model))
        checkpoints = [source for source in sources.values() if isinstance(source, (str, Path))]
        leaves = requirements.check(catalogue, names, checkpoints=checkpoints, offline=offline)
        join(settings.device)
        path = Path(output or stack.enter_context(tempfile.TemporaryDirectory()))
        if is_main_process():
            new = not path.exists()
            open_folder(real_path(path), folder.HOLDS)
            stack.enter_context(locked(path, path))
            if new:
                stack.callback(remove_unused, path)
        path.mkdir(parents=True, exist_ok=True)
        with one_first():
            # Before a model is loaded: gqa's code starts processes for it, and data may turn out to be broken.
            loaded = {leaf: catalogue.load(leaf) for group in leaves.values() for leaf in group}
        types = [
            read_config(source).model_type
            if isinstance(source, (str, Path))
            else source.model.config.model_type
            for source in sources.values()
        ]
        refuse_unseen(loaded, [find_family(kind, unlisted=True) for kind in types])
        keep = output is not None
        return Evaluation(sources, leaves, catalogue, loaded, settings, path, keep, force, progress).run()


def prepare(
    tasks: Sequence[str],
    include_path: str | Path | Sequence[str | Path] | None = None,
    checkpoints: Sequence[str | Path] = (),
) -> dict[str, int]:
    """Download ahead of time what an evaluation needs: the data of its tasks, and checkpoints from the hub.

    Returns:
        Number of documents by task.

    Raises:
        PmodError: Unknown task, no login, no room on the disk, data that cannot be had ...
    """
    names = paper.expand(tasks)
    catalogue = Tasks(names, include_path)
    leaves = requirements.check(catalogue, names, checkpoints=checkpoints, preparing=True)
    for source in checkpoints:
        open_source(source)
    wanted = dict.fromkeys(leaf for group in leaves.values() for leaf in group)
    return {leaf: len(catalogue.load(leaf).eval_docs) for leaf in wanted}


@dataclass
class Evaluation:
    """One call of `evaluate` at work: every task with every model, and what is known after each.

    ``sources``, ``models`` and ``runs`` are by role, ``baseline`` (if any) first. ``leaves`` are the tasks behind each
    requested name, ``loaded`` lmms-eval's task objects with their data. Results are written into ``path`` only with
    ``keep``; without it answers alone are kept, in the user's cache.
    """

    sources: dict[str, str | Path | VisionLanguageModel]
    leaves: dict[str, list[str]]
    catalogue: Tasks
    loaded: dict[str, Any]
    settings: EvalSettings
    path: Path
    keep: bool
    force: bool
    progress: Progress | None
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    runs: dict[str, dict[str, TaskRun]] = field(default_factory=dict)
    scored: dict[str, TaskResult] = field(default_factory=dict)
    started: datetime = field(default_factory=lambda: datetime.now(timezone.utc))

    def run(self) -> EvalResult:
        """All tasks with the baseline, then all with the model: one of them is in memory at a time."""
        from pmod_cli.evaluation.adapter import PmodLmms

        for role, source in self.sources.items():
            self.models[role] = gather(identity.describe(source) if is_main_process() else {})[0]
            self.runs[role] = {}
        if self.keep and not self.force:
            folder.claim(self.path, self.models)
        for role, source in self.sources.items():
            lm = PmodLmms(
                str(open_source(source).folder) if isinstance(source, (str, Path)) else source,
                **{name: value for name, value in vars(self.settings).items() if name != "limit"},
                raise_failures=False,
            )
            for leaf, task in self.loaded.items():
                self._run_task(lm, role, leaf, task)
            del lm
        result = self.result()
        if self.keep and is_main_process():
            folder.write_results(self.path, result)
        return result

    def _run_task(self, lm: PmodLmms, role: str, leaf: str, task: Any) -> None:
        total = len(task.eval_docs)
        limit = document_limit(leaf, self.settings.limit, total)
        before = lm.generated + lm.recalled

        def answered(number: int) -> None:  # it must not hold the model
            if self.progress:
                self.progress(f"{role}: {leaf}", number - before, -(-(limit or total) // world_size()))

        lm.on_answers = answered
        lm.store = self._store(lm, role, leaf, task)
        run = run_task(lm, self.catalogue, task, limit=limit, output=self.path)
        generated, recalled, seconds = zip(*gather((lm.generated, lm.recalled, lm.seconds)), strict=True)
        self.models[role] |= lm.conditions() | {
            "batch": {"largest": lm.sizer.largest, "out_of_memory": lm.sizer.out_of_memory},
            "answers": {
                "generated": sum(generated),
                "recalled": sum(recalled),
                "seconds": round(max(seconds), 3),
                "per_second": round(sum(generated) / max(seconds), 3) if sum(generated) else None,
            },
        }
        if run is None:
            return
        self.runs[role][leaf] = run
        if self.keep:
            samples = {side: runs[leaf].samples for side, runs in self.runs.items() if leaf in runs}
            folder.write_samples(self.path, leaf, samples)
            folder.write_results(self.path, self.result())

    def _store(self, lm: PmodLmms, role: str, leaf: str, task: Any) -> AnswerStore | None:
        """Where this model's answers to this task are kept; a model in memory has no fingerprint to keep them by."""
        fingerprint = self.models[role]["fingerprint"]
        if not fingerprint:
            return None
        conditions = {
            "checkpoint": fingerprint,
            "task": identity.describe_task(task),
            "max_new_tokens": self.settings.max_new_tokens,
            "packages": identity.environment(),
        }
        key = identity.digest([conditions, lm.conditions()])
        answers = self.path / "answers" if self.keep else folder.answers_cache()
        try:
            return AnswerStore(answers / key[:16] / leaf, rank(), self.force, world_size())
        except OSError:
            if self.keep:
                raise
            return None  # a cache that cannot be written is no reason not to evaluate

    def result(self) -> EvalResult:
        """What is known by now."""
        model, baseline = self.runs["model"], self.runs.get("baseline", {})
        for name, group in self.leaves.items():
            if name not in self.scored and all(leaf in model for leaf in group):
                base = [baseline[leaf] for leaf in group] if baseline else []
                self.scored[name] = TaskResult.of(name, [model[leaf] for leaf in group], base)
        failures, broken_metrics = (
            {
                role: {leaf: errors for leaf, run in done.items() if (errors := getattr(run, kind))}
                for role, done in self.runs.items()
            }
            for kind in ("failures", "broken_metrics")
        )
        return EvalResult(
            tasks=[self.scored[name] for name in self.leaves if name in self.scored],
            complete=self.scored.keys() == self.leaves.keys(),
            model=self.models["model"],
            baseline=self.models.get("baseline"),
            environment=identity.environment() | {"seeds": SEEDS, "processes": world_size()},
            settings=vars(self.settings) | {"include_path": self.catalogue.folders},
            task_info={leaf: identity.describe_task(task) for leaf, task in self.loaded.items()},
            failures=failures,
            broken_metrics=broken_metrics,
            started=self.started.isoformat(timespec="seconds"),
            seconds=(datetime.now(timezone.utc) - self.started).total_seconds(),
        )
