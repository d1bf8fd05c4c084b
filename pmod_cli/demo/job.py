"""The whole job on the embedded example: baseline, convert, fine-tune, profile, evaluate, compare.

Every step calls the function behind a public command, and shows that command as a user would type it. The functions
are imported where they are called: `check_packages` has to come first.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from pmod_cli.demo import data, world
from pmod_cli.demo.steps import Steps
from pmod_cli.extras import require, require_if_installed
from pmod_cli.output.errors import GateError
from pmod_cli.output.files import tag, write_json

BASELINE = Path(__file__).parent / "assets" / "baseline"
"""The trained baseline that travels with the package (see ``docs/demo.md``)."""

TASK = "pmod_demo"
SHUFFLED = f"{TASK}_shuffled"
QUESTION = "How many shapes are there?"
"""Asked about the picture whose patches are drawn; the model needs all of the picture for it."""

BATCH = 32
"""Samples of a batch, for evaluation and for timing: one sample alone is too small for its FLOPs to show in time."""

LABELS = {
    "baseline": "baseline",
    "dense-control": "dense, fine-tuned (control)",
    "pmod-start": "p-MoD, before fine-tuning",
    "pmod": "p-MoD, fine-tuned",
}
"""What the models' folders are called in tables and in the report."""

Progress = Callable[[str, int, int], None]
"""Called with what is going on, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class DemoSettings:
    """How large the demo is.

    Attributes:
        train_images: Pictures to fine-tune on, one question of each kind about each.
        heldout_images: Pictures to evaluate on, likewise.
        steps: Optimizer steps of fine-tuning, the same for p-MoD and the dense control.
    """

    train_images: int = 1600
    heldout_images: int = 120
    steps: int = 200


def run_demo(
    folder: Path,
    settings: DemoSettings,
    announce: Callable[[str], None],
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run the demo, or what is left of it.

    Args:
        folder: Everything goes under it.
        settings: Its size.
        announce: Called with a line of (rich) text before each step.
        progress: Called while models are trained and evaluated.

    Returns:
        The report, which is also written to ``folder/report.json``: ``rows`` (one for each model), ``kinds``,
        ``targets`` (each with ``met``), ``seconds`` by step, ``retention``, ``files``.

    Raises:
        MissingExtraError: See `check_packages`; nothing has been made then.
        BrokenPackageError: Likewise.
    """
    check_packages()
    from pmod_cli.demo.summary import draw_layers, retention, summarize
    from pmod_cli.report import write_report

    folder = folder.resolve()
    demo = _Demo(folder, settings, Steps(folder, announce), progress or (lambda *_: None))
    demo.make_data()
    demo.copy_baseline()
    demo.convert()
    demo.finetune("finetune-pmod", "pmod-start", "pmod", "convert")
    demo.finetune("finetune-dense", "baseline", "dense-control", "baseline")
    profiled = demo.profile()
    accuracies = {
        "baseline": demo.evaluate("eval-baseline", "baseline", "baseline"),
        "baseline, images shuffled": demo.evaluate("eval-shuffled", "baseline", "baseline", SHUFFLED),
        LABELS["dense-control"]: demo.evaluate("eval-dense", "dense-control", "finetune-dense"),
        LABELS["pmod-start"]: demo.evaluate("eval-pmod-start", "pmod-start", "convert"),
        LABELS["pmod"]: demo.evaluate("eval-pmod", "pmod", "finetune-pmod"),
    }
    kept = retention(demo.visualize())
    files = {
        name: folder / file
        for name, file in {
            "json": "report.json",
            "layers": "layers.png",
            "kept_patches": "kept_patches.png",
            "visualize": "visualize.html",
            "report": "report.html",
        }.items()
    }
    draw_layers(files["layers"], profiled, kept, BATCH)
    report = summarize(accuracies, profiled, kept, demo.made["guessing"], BATCH) | {
        "seconds": demo.steps.seconds,
        "wall_seconds": sum(demo.steps.seconds.values()),
        "batch": BATCH,
        "settings": vars(settings),
        "models": {str(demo.models / name): label for name, label in LABELS.items()},
        "files": {name: str(path) for name, path in files.items()},
    }
    write_json(files["json"], tag("demo") | report)  # before the page, which takes the models' names from it
    write_report([folder], files["report"], force=True)
    return report


def check_packages() -> None:
    """Import every optional package that a later step needs: none of them should fail after minutes of training.

    Raises:
        MissingExtraError: One is not installed.
        BrokenPackageError: One is installed and cannot be imported.
    """
    from pmod_cli.evaluation.catalogue import import_lmms_eval

    import_lmms_eval()
    require("fvcore")
    require("matplotlib")
    require_if_installed("peft")  # transformers' Trainer imports it wherever it is


class _Demo:
    """The steps of one run."""

    def __init__(self, folder: Path, settings: DemoSettings, steps: Steps, progress: Progress) -> None:
        self.folder, self.settings, self.steps, self.progress = folder, settings, steps, progress
        self.models = folder / "models"
        self.made: dict[str, Any] = {}

    def make_data(self) -> None:
        self.made = self.steps.run(
            "data", vars(self.settings), lambda: _make_data(self.folder, self.settings)
        )

    def copy_baseline(self) -> None:
        destination = self.models / "baseline"

        def copy() -> dict[str, str]:
            with data.replacing_folder(destination) as partial:
                shutil.copytree(BASELINE, partial, dirs_exist_ok=True)
            return {"model": str(destination)}

        files = [(path.name, sha256(path.read_bytes()).hexdigest()) for path in sorted(BASELINE.iterdir())]
        self.steps.run("baseline", files, copy)

    def convert(self) -> None:
        from pmod_cli.conversion.convert import convert
        from pmod_cli.conversion.plan import plan_conversion
        from pmod_cli.recipe import load_recipe

        source, output = self.models / "baseline", self.models / "pmod-start"

        def action() -> dict[str, Any]:
            plan = plan_conversion(source, recipe=load_recipe("demo"))
            return convert(plan, output, force=True).to_dict() | {"pushed_to": None}

        self.steps.command(
            "convert", ["convert", source, output, "--recipe", "demo", "--force"], action, ["baseline"]
        )

    def finetune(self, step: str, source: str, output: str, need: str) -> None:
        """Fine-tune one model into another; both are folders of ``models``."""
        from transformers.utils import logging

        from pmod_cli.recipe import load_recipe
        from pmod_cli.training.finetune import finetune

        logging.disable_progress_bar()  # one bar is enough
        model, tuned = self.models / source, self.models / output
        train, images = self.made["train"], self.made["images"]
        limit = f"train.max_steps={self.settings.steps}"

        def action() -> dict[str, Any]:
            return finetune(
                str(model),
                train,
                Path(images),
                tuned,
                recipe=load_recipe("demo", [limit]),
                force=True,
                progress=lambda done, total, _: self.progress(step, done, total),
            ).to_dict()

        words = ["finetune", model, "--data", train, "--images", images, "--output", tuned]
        self.steps.command(
            step, [*words, "--recipe", "demo", "--set", limit, "--force"], action, ["data", need]
        )

    def profile(self) -> dict[str, Any]:
        from pmod_cli.profiling.profile import Settings, profile
        from pmod_cli.profiling.subject import find_subject

        model, control = self.models / "pmod", self.models / "dense-control"

        def action() -> dict[str, Any]:
            subject = find_subject(str(model), baseline=str(control))
            settings = Settings(dtype="float32", new_tokens=16, batch=BATCH)
            return profile(subject, settings, measure_options={}).to_dict()

        how = ["--latency", "--dtype", "float32", "--new-tokens", "16", "--batch", str(BATCH)]
        return self.steps.command(
            "profile",
            ["profile", model, "--baseline", control, *how],
            action,
            ["finetune-pmod", "finetune-dense"],
        )

    def evaluate(self, step: str, name: str, need: str, task: str = TASK) -> dict[str, float]:
        """Evaluate the model ``models/NAME``: accuracy in points, by kind of question and overall."""
        from pmod_cli.demo.summary import accuracy
        from pmod_cli.evaluation.evaluate import evaluate
        from pmod_cli.evaluation.options import EvalSettings

        model, output = self.models / name, self.folder / "eval" / step

        def action() -> dict[str, Any]:
            result = evaluate(
                str(model),
                [task],
                include_path=self.made["tasks"],
                output=output,
                settings=EvalSettings(batch_size=BATCH),
                progress=lambda _, done, total: self.progress(step, done, total),
            )
            if result.failed_samples:
                raise GateError(f"{result.failed_samples} samples failed", result.first_failure)
            return result.to_dict() | {"missed": []}

        words = ["eval", model, "--tasks", task, "--include-path", self.made["tasks"]]
        words += ["--batch-size", str(BATCH), "--output", output]
        return accuracy(self.steps.command(step, words, action, ["data", need]))

    def visualize(self) -> dict[str, Any]:
        from pmod_cli.visualize.visualize import visualize

        model, control = self.models / "pmod", self.models / "dense-control"
        files = {"sheet": self.folder / "kept_patches.png", "html": self.folder / "visualize.html"}
        picture = self.made["picture"]

        def action() -> dict[str, Any]:
            return visualize(
                str(model), Path(picture), QUESTION, files=files, baseline=str(control), max_new_tokens=8
            )

        words = ["visualize", model, "--image", picture, "--prompt", QUESTION, "--baseline", control]
        words += ["-o", files["sheet"], "--html", files["html"], "--max-new-tokens", "8", "--force"]
        return self.steps.command("visualize", words, action, ["data", "finetune-pmod", "finetune-dense"])


def _make_data(folder: Path, settings: DemoSettings) -> dict[str, Any]:
    """Draw the pictures and write them in both forms; returns where they are."""
    from pmod_cli.evaluation.tasks import write_task

    train, images = data.write_training_data(folder / "data" / "train", settings.train_images)
    tasks = folder / "tasks"
    for name in (TASK, SHUFFLED):
        questions = data.write_heldout(
            folder / "data" / name, settings.heldout_images, shuffle=name == SHUFFLED
        )
        write_task(tasks, name, questions, world.KINDS)
    heldout = data.heldout_samples(settings.heldout_images)
    picture = folder / "data" / "example.png"
    # A picture of two shapes shows more than one of one.
    example = next((question for question in heldout if question.answer == "two"), heldout[0])
    example.image.save(picture)
    return {
        "train": str(train),
        "images": str(images),
        "tasks": str(tasks),
        "picture": str(picture),
        "guessing": _guessing_level(train, heldout),
    }


def _guessing_level(train: Path, heldout: list[data.HeldoutQuestion]) -> float:
    """Accuracy, in points, of always giving the training data's most frequent answer to the same question."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for record in json.loads(train.read_text()):
        turns = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            counts[question][answer] += 1
    guesses = {question: answers.most_common(1)[0][0] for question, answers in counts.items()}
    return 100 * sum(guesses.get(each.question) == each.answer for each in heldout) / len(heldout)
