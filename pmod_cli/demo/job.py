"""The whole job on the embedded example: baseline, convert, fine-tune, profile, evaluate, compare.

Every step but the first two is what a public command does, shown as a user would type it. What is finished is kept,
and reused as long as nothing before it changed.
"""

from __future__ import annotations

import json
import shlex
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from PIL.PngImagePlugin import PngInfo
from rich.markup import escape

from pmod_cli import __version__
from pmod_cli.demo import data, world
from pmod_cli.extras import require, require_if_installed
from pmod_cli.output.errors import GateError, PmodError
from pmod_cli.output.files import TAG, locked, open_folder, replacing, tag, write_json
from pmod_cli.output.reading import read_json
from pmod_cli.output.text import plain

BASELINE = Path(__file__).parent / "assets" / "baseline"
"""The trained baseline that travels with the package (see ``docs/demo.md``)."""

TASK, SHUFFLED = "pmod_demo", "pmod_demo_shuffled"
QUESTION = "How many shapes are there?"
"""Asked about the picture whose patches are drawn; the model needs all of the picture for it."""

BATCH = 32
"""Samples per batch, for evaluation and for timing: one sample alone is too small for its FLOPs to show in time."""

LABELS = {
    "baseline": "baseline",
    "dense-control": "dense, fine-tuned (control)",
    "pmod-start": "p-MoD, before fine-tuning",
    "pmod": "p-MoD, fine-tuned",
}
"""What the models' folders are called in tables and in the report."""

EVALUATIONS = {
    LABELS["baseline"]: ("eval-baseline", "baseline", "baseline", TASK),
    "baseline, images shuffled": ("eval-shuffled", "baseline", "baseline", SHUFFLED),
    LABELS["dense-control"]: ("eval-dense", "finetune-dense", "dense-control", TASK),
    LABELS["pmod-start"]: ("eval-pmod-start", "convert", "pmod-start", TASK),
    LABELS["pmod"]: ("eval-pmod", "finetune-pmod", "pmod", TASK),
}
"""By row of the table: the step, the step that makes its model, the model's folder, and the task."""


@dataclass(frozen=True)
class DemoSettings:
    """How large the demo is: pictures to fine-tune on and to evaluate on, and optimizer steps of each model."""

    train_images: int = 1600
    heldout_images: int = 120
    steps: int = 200


def run_demo(
    folder: Path,
    settings: DemoSettings,
    announce: Callable[[str], None],
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Run the demo, or what is left of it.

    Args:
        folder: Everything goes under it.
        settings: Its size.
        announce: Called with a line of (rich) text before each step.
        progress: Called while models are trained and evaluated: the step, how much is done, of how much.

    Returns:
        The report, which is also written to ``folder/report.json``: ``rows`` (one for each model), ``kinds``,
        ``targets`` (each with ``met``), ``seconds`` by step, ``retention``, ``files``.

    Raises:
        MissingExtraError: A package that a step needs is not installed; nothing has been made then.
        BrokenPackageError: It cannot be imported; likewise.
    """
    from pmod_cli.evaluation.catalogue import import_lmms_eval

    # All that a later step needs: nothing should be found missing after minutes of training.
    import_lmms_eval()
    require("fvcore")
    require("matplotlib")
    require_if_installed("peft")  # transformers' Trainer imports it wherever it is

    folder = folder.resolve()
    open_folder(folder, ("data", "eval", "models", "steps", "tasks"))
    (folder / "steps").mkdir(exist_ok=True)
    with locked(folder, folder):
        return _run_steps(folder, settings, announce, progress)


def _run_steps(
    folder: Path,
    settings: DemoSettings,
    announce: Callable[[str], None],
    progress: Callable[[str, int, int], None] | None,
) -> dict[str, Any]:
    from pmod_cli.demo.summary import accuracy, retention, summarize
    from pmod_cli.report import write_report

    models, steps = folder / "models", _Steps(folder / "steps", announce)
    made = steps.run("data", vars(settings), lambda: _make_data(folder, settings))
    shipped = [(path.name, sha256(path.read_bytes()).hexdigest()) for path in sorted(BASELINE.iterdir())]
    steps.run("baseline", shipped, lambda: _copy_baseline(models / "baseline"))
    files = {
        "json": folder / "report.json",
        "layers": folder / "layers.png",
        "kept_patches": folder / "kept_patches.png",
        "visualize": folder / "visualize.html",
        "report": folder / "report.html",
    }
    show = progress or (lambda *_: None)
    results = {
        name: steps.run(name, words, action, needs, words[0])
        for name, (needs, words, action) in _commands(folder, settings, files, show).items()
    }
    accuracies = {label: accuracy(results[name]) for label, (name, *_) in EVALUATIONS.items()}
    kept = retention(results["visualize"])
    report = summarize(accuracies, results["profile"], kept, made["guessing"], BATCH) | {
        "seconds": steps.seconds,
        "wall_seconds": sum(steps.seconds.values()),
        "batch": BATCH,
        "settings": vars(settings),
        "models": {str(models / name): label for name, label in LABELS.items()},
        "files": {name: str(path) for name, path in files.items()},
    }
    write_json(files["json"], tag("demo") | report)  # before the page, which takes the models' names from it
    write_report([folder], files["report"], force=True, include_path=folder / "tasks")
    return report


def _commands(
    folder: Path, settings: DemoSettings, files: dict[str, Path], show: Callable[[str, int, int], None]
) -> dict[str, tuple[list[str], list[str], Callable[[], dict[str, Any]]]]:
    """By name of its step, each command: the steps that it builds on, its words, and what does it."""
    baseline, control, start, tuned = (folder / "models" / name for name in LABELS)
    train, images = folder / "data" / "train" / "train.json", folder / "data" / "train" / "images"
    limit, tasks, picture = (
        f"train.max_steps={settings.steps}",
        folder / "tasks",
        folder / "data" / "example.png",
    )
    steps = ["--data", train, "--images", images, "--recipe", "demo", "--set", limit, "--force"]
    latency = ["--latency", "--dtype", "float32", "--new-tokens", 16, "--batch", BATCH]
    latency += ["--plot", files["layers"], "--force"]
    asked = ["--image", picture, "--prompt", QUESTION, "--max-new-tokens", 8]
    drawn = ["-o", files["kept_patches"], "--html", files["visualize"], "--force"]
    fine_tuned = ["finetune-pmod", "finetune-dense"]
    table: dict[str, tuple[list[str], list[Any], Callable[[], dict[str, Any]]]] = {
        "convert": (
            ["baseline"],
            ["convert", baseline, start, "--recipe", "demo", "--force"],
            partial(_convert, baseline, start),
        )
    }
    for name, need, model, output in (
        ("finetune-pmod", "convert", start, tuned),
        ("finetune-dense", "baseline", baseline, control),
    ):
        table[name] = (
            ["data", need],
            ["finetune", model, "--output", output, *steps],
            partial(_finetune, model, output, train, images, limit, partial(show, name)),
        )
    table["profile"] = (
        fine_tuned,
        ["profile", tuned, "--baseline", control, *latency],
        partial(_profile, tuned, control, files["layers"]),
    )
    for name, need, model_name, task in EVALUATIONS.values():
        model, output = folder / "models" / model_name, folder / "eval" / name
        given = ["--include-path", tasks, "--batch-size", BATCH, "--output", output]
        table[name] = (
            ["data", need],
            ["eval", model, "--tasks", task, *given],
            partial(_evaluate, model, task, tasks, output, lambda *at, name=name: show(name, *at[-2:])),
        )
    table["visualize"] = (
        ["data", *fine_tuned],
        ["visualize", tuned, "--baseline", control, *asked, *drawn],
        partial(_visualize, tuned, control, picture, files),
    )
    return {name: (needs, list(map(str, words)), action) for name, (needs, words, action) in table.items()}


def _convert(source: Path, output: Path) -> dict[str, Any]:
    from pmod_cli.conversion.convert import convert
    from pmod_cli.conversion.plan import plan_conversion
    from pmod_cli.recipe import load_recipe

    plan = plan_conversion(source, recipe=load_recipe("demo"))
    return convert(plan, output, force=True) | {"pushed_to": None}


def _finetune(
    model: Path, output: Path, data: Path, images: Path, limit: str, show: Callable[[int, int], None]
) -> dict[str, Any]:
    from transformers.utils import logging

    from pmod_cli.recipe import load_recipe
    from pmod_cli.training.finetune import finetune

    logging.disable_progress_bar()  # one bar is enough
    recipe = load_recipe("demo", [limit])
    return finetune(
        str(model),
        str(data),
        images,
        output,
        recipe=recipe,
        force=True,
        progress=lambda done, total, _: show(done, total),
    )


def _profile(model: Path, control: Path, picture: Path) -> dict[str, Any]:
    from pmod_cli.profiling.options import ProfileOptions
    from pmod_cli.profiling.plots import plot_profile
    from pmod_cli.profiling.profile import profile
    from pmod_cli.profiling.subject import find_subject

    options = ProfileOptions(latency=True, dtype="float32", new_tokens=16, batch=BATCH)
    result = profile(find_subject(str(model), baseline=str(control)), options)
    plot_profile(result, picture)
    return result


def _evaluate(
    model: Path, task: str, tasks: Path, output: Path, progress: Callable[..., None]
) -> dict[str, Any]:
    from pmod_cli.evaluation.evaluate import evaluate
    from pmod_cli.evaluation.options import EvalSettings

    settings = EvalSettings(batch_size=BATCH)
    result = evaluate(
        str(model), [task], include_path=tasks, output=output, settings=settings, progress=progress
    )
    if result.failed_samples:
        raise GateError(f"{result.failed_samples} samples failed", result.first_failure)
    return result.to_dict() | {"missed": []}


def _visualize(model: Path, control: Path, picture: Path, files: dict[str, Path]) -> dict[str, Any]:
    from pmod_cli.visualize.options import VisualizeOptions
    from pmod_cli.visualize.visualize import visualize

    drawn: dict[str, Any] = {"output": files["kept_patches"], "html": files["visualize"], "force": True}
    how: dict[str, Any] = {"baseline": str(control), "max_new_tokens": 8}
    return visualize(VisualizeOptions(str(model), picture, QUESTION, **drawn, **how))


class _Steps:
    """The finished steps of a demo.

    Each step has a file ``NAME.json`` with its result, its wall time and a digest of all that it depends on: its own
    arguments, the steps it builds on, and the version of pmod.

    Args:
        folder: Where the files are.
        announce: Called with a line of text before each step.
    """

    def __init__(self, folder: Path, announce: Callable[[str], None]) -> None:
        self.folder, self.announce = folder, announce
        self.seconds: dict[str, float] = {}
        self._digests: dict[str, str] = {}

    def run(
        self, name: str, key: Any, action: Callable[[], Any], needs: Sequence[str] = (), command: str = "demo"
    ) -> Any:
        """The result of a step, from its file if it is finished.

        Args:
            name: Of the step; a file name.
            key: Its arguments, in what JSON can write: of a command, its words.
            action: Does the work.
            needs: Steps that it builds on, run before.
            command: Whose result it is; `pmod report` reads it.
        """
        parts = [__version__, command, key, [self._digests[need] for need in needs]]
        digest = self._digests[name] = sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        path = self.folder / f"{name}.json"
        try:
            finished = read_json(path)
        except PmodError:
            finished = {}
        if finished.get("digest") == digest:
            self.announce(f"[dim]{escape(name)}: finished before, reused[/dim]")
            self.seconds[name] = finished["seconds"]
            return finished["result"]
        if command != "demo":
            self.announce(f"[bold cyan]$ pmod {escape(plain(shlex.join(key)))}[/bold cyan]")
        started = time.perf_counter()
        result = action()
        self.seconds[name] = time.perf_counter() - started
        known = {"digest": digest, "seconds": self.seconds[name]}
        write_json(path, tag(command) | known | {"result": result})
        return result


def _copy_baseline(destination: Path) -> dict[str, str]:
    with data.replacing_folder(destination) as partial:
        shutil.copytree(BASELINE, partial, dirs_exist_ok=True)
    return {"model": str(destination)}


def _make_data(folder: Path, settings: DemoSettings) -> dict[str, Any]:
    """Draw the pictures and write them in both forms."""
    from pmod_cli.evaluation.tasks import write_task

    train, _ = data.write_training_data(folder / "data" / "train", settings.train_images)
    for name in (TASK, SHUFFLED):
        path = folder / "data" / name
        questions = data.write_heldout(path, settings.heldout_images, shuffle=name == SHUFFLED)
        write_task(folder / "tasks", name, questions, world.KINDS)
    heldout = data.heldout_samples(settings.heldout_images)
    # A picture of two shapes shows more than one of one.
    example = next((question for question in heldout if question.answer == "two"), heldout[0])
    tagged = PngInfo()
    tagged.add_text("Comment", TAG)
    with replacing(folder / "data" / "example.png") as path:
        example.image.save(path, pnginfo=tagged)
    return {"guessing": _guessing_level(train, heldout)}


def _guessing_level(train: Path, heldout: list[data.HeldoutQuestion]) -> float:
    """Accuracy, in points, of always giving the training data's most frequent answer to the same question."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for record in json.loads(train.read_text()):
        turns = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            counts[question][answer] += 1
    guesses = {question: answers.most_common(1)[0][0] for question, answers in counts.items()}
    return 100 * sum(guesses.get(each.question) == each.answer for each in heldout) / len(heldout)
