"""The public commands that the demo runs: each as a user would type it, and as it runs in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pmod_cli.output.errors import GateError

Show = Callable[[int, int], None]
"""Told how much of a command is done, of how much."""

BATCH = 32
"""Samples per batch, for evaluation and for timing: one sample alone is too small for its FLOPs to show in time."""

CALIBRATION_QUESTIONS = 192


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        words: As typed, the verb first.
        action: Does the same, and gives what its ``--json`` prints.
    """

    words: list[str]
    action: Callable[[], dict[str, Any]]


def _command(action: Callable[[], dict[str, Any]], *words: object) -> Command:
    return Command([str(word) for word in words], action)


def _set(settings: Sequence[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def convert(source: Path, output: Path, settings: Sequence[str] = ()) -> Command:
    """``pmod convert`` with the recipe ``demo``."""
    words = ["convert", source, output, "--recipe", "demo", *_set(settings), "--force"]
    return _command(partial(_convert, source, output, settings), *words)


def _convert(source: Path, output: Path, settings: Sequence[str]) -> dict[str, Any]:
    from pmod_cli.conversion.convert import convert
    from pmod_cli.conversion.plan import plan_conversion
    from pmod_cli.recipe import load_recipe

    plan = plan_conversion(source, recipe=load_recipe("demo", settings))
    return convert(plan, output, force=True) | {"pushed_to": None}


def calibrate(model: Path, output: Path, train: Path, images: Path, show: Show) -> Command:
    """``pmod calibrate``, at the model's own ratios."""
    words = ["calibrate", model, "--data", train, "--images", images, "--output", output]
    words += ["--samples", CALIBRATION_QUESTIONS, "--force"]
    return _command(partial(_calibrate, model, output, train, images, show), *words)


def _calibrate(model: Path, output: Path, train: Path, images: Path, show: Show) -> dict[str, Any]:
    from pmod_cli.calibration.calibrate import calibrate
    from pmod_cli.calibration.options import CalibrateOptions

    given: dict[str, Any] = {"images": images, "samples": CALIBRATION_QUESTIONS, "force": True}
    options = CalibrateOptions(str(model), str(train), output, **given)
    return calibrate(options, lambda _, done, total: show(done, total))


def finetune(
    model: Path, output: Path, train: Path, images: Path, settings: Sequence[str], show: Show
) -> Command:
    """``pmod finetune`` with the recipe ``demo``."""
    words = ["finetune", model, "--output", output, "--data", train, "--images", images]
    words += ["--recipe", "demo", *_set(settings), "--force"]
    return _command(partial(_finetune, model, output, train, images, settings, show), *words)


def _finetune(
    model: Path, output: Path, train: Path, images: Path, settings: Sequence[str], show: Show
) -> dict[str, Any]:
    from transformers.utils import logging

    from pmod_cli.recipe import load_recipe
    from pmod_cli.training.finetune import finetune

    logging.disable_progress_bar()  # one bar is enough
    return finetune(
        str(model),
        str(train),
        images,
        output,
        recipe=load_recipe("demo", settings),
        force=True,
        progress=lambda done, total, _: show(done, total),
    )


def profile(model: Path, baseline: Path, plot: Path | None = None) -> Command:
    """``pmod profile`` beside a baseline; with a plot, time is measured too."""
    words: list[object] = ["profile", model, "--baseline", baseline, "--dtype", "float32"]
    if plot is not None:
        words += [
            "--latency",
            "--repeats",
            3,
            "--new-tokens",
            16,
            "--batch",
            BATCH,
            "--plot",
            plot,
            "--force",
        ]
    return _command(partial(_profile, model, baseline, plot), *words)


def _profile(model: Path, baseline: Path, plot: Path | None) -> dict[str, Any]:
    from pmod_cli.profiling.options import ProfileOptions
    from pmod_cli.profiling.plots import plot_profile
    from pmod_cli.profiling.profile import profile
    from pmod_cli.profiling.subject import find_subject

    measured: dict[str, Any] = {"latency": True, "repeats": 3, "new_tokens": 16, "batch": BATCH}
    options = ProfileOptions(dtype="float32", **({} if plot is None else measured))
    result = profile(find_subject(str(model), baseline=str(baseline)), options)
    if plot is not None:
        plot_profile(result, plot)
    return result


def evaluate(model: Path, task: str, tasks: Path, output: Path, show: Show) -> Command:
    """``pmod eval`` on one task."""
    words = ["eval", model, "--tasks", task, "--include-path", tasks, "--batch-size", BATCH]
    words += ["--output", output, "--force"]
    return _command(partial(_evaluate, model, task, tasks, output, show), *words)


def _evaluate(model: Path, task: str, tasks: Path, output: Path, show: Show) -> dict[str, Any]:
    from pmod_cli.evaluation.evaluate import evaluate
    from pmod_cli.evaluation.options import EvalSettings

    settings = EvalSettings(batch_size=BATCH)
    result = evaluate(
        str(model),
        [task],
        include_path=tasks,
        output=output,
        force=True,  # of other settings before
        settings=settings,
        progress=lambda *at: show(*at[-2:]),
    )
    if result.failed_samples:
        raise GateError(f"{result.failed_samples} samples failed", result.first_failure)
    return result.to_dict() | {"missed": []}


def visualize(model: Path, baseline: Path, picture: Path, question: str, sheet: Path, page: Path) -> Command:
    """``pmod visualize`` beside a baseline: a sheet of pictures, and a page."""
    words = ["visualize", model, "--baseline", baseline, "--image", picture, "--prompt", question]
    words += ["--max-new-tokens", 8, "-o", sheet, "--html", page, "--force"]
    return _command(partial(_visualize, model, baseline, picture, question, sheet, page), *words)


def _visualize(
    model: Path, baseline: Path, picture: Path, question: str, sheet: Path, page: Path
) -> dict[str, Any]:
    from pmod_cli.visualize.options import VisualizeOptions
    from pmod_cli.visualize.visualize import visualize

    drawn: dict[str, Any] = {"output": sheet, "html": page, "force": True}
    how: dict[str, Any] = {"baseline": str(baseline), "max_new_tokens": 8}
    return visualize(VisualizeOptions(str(model), picture, question, **drawn, **how))
