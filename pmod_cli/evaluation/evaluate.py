"""A whole evaluation: one model, or a model and its baseline, on any of lmms-eval's tasks."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from pmod_cli.evaluation import paper, requirements
from pmod_cli.evaluation.catalogue import Tasks, import_lmms_eval
from pmod_cli.evaluation.folder import OutputFolder, answers_cache
from pmod_cli.evaluation.identity import checkpoint_folder
from pmod_cli.evaluation.options import EvalSettings, Progress
from pmod_cli.evaluation.processes import join, one_first
from pmod_cli.evaluation.results import EvalResult
from pmod_cli.evaluation.session import Evaluation
from pmod_cli.output.errors import PmodError

if TYPE_CHECKING:
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
    paths = [include_path] if isinstance(include_path, (str, Path)) else list(include_path or ())
    names = _expand(tasks)
    sources = {"baseline": baseline, "model": model} if baseline is not None else {"model": model}
    with ExitStack() as stack:
        stack.enter_context(requirements.offline_mode(offline))
        catalogue = Tasks(names, paths)
        checkpoints = [source for source in sources.values() if isinstance(source, (str, Path))]
        leaves = requirements.check(catalogue, names, checkpoints=checkpoints, offline=offline)
        join(settings.device)
        if output is None:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            folder = OutputFolder(place, answers_cache())
        else:
            folder = OutputFolder(Path(output))
        with one_first():
            # Before a model is loaded: gqa's code starts processes for it, and data may turn out to be broken.
            loaded = {leaf: catalogue.load(leaf) for group in leaves.values() for leaf in group}
        evaluation = Evaluation(
            sources, leaves, catalogue, loaded, settings, folder, keep=output is not None, progress=progress
        )
        return evaluation.run(force)


def prepare(
    tasks: Sequence[str],
    include_path: Sequence[str | Path] = (),
    checkpoints: Iterable[str | Path] = (),
) -> dict[str, int]:
    """Download ahead of time what an evaluation needs: the data of its tasks, and checkpoints from the hub.

    Returns:
        Number of documents by task.

    Raises:
        PreflightError: Unknown task, no login, no room on the disk, ...
        PmodError: Data that cannot be had.
    """
    names = _expand(tasks)
    catalogue = Tasks(names, include_path)
    checkpoints = list(checkpoints)
    leaves = requirements.check(catalogue, names, checkpoints=checkpoints, preparing=True)
    for source in checkpoints:
        checkpoint_folder(source)
    return {
        leaf: len(catalogue.load(leaf).eval_docs)
        for leaf in dict.fromkeys(leaf for group in leaves.values() for leaf in group)
    }


def _expand(tasks: Sequence[str]) -> list[str]:
    names = paper.expand(list(tasks))
    if not names:
        raise PmodError("no task to evaluate", "e.g. --tasks gqa,pope_full")
    return names
