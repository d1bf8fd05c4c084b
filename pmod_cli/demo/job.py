"""The whole job on the embedded example: baseline, convert, fine-tune, profile, evaluate, compare.

Every step but the first two is what a public command does, shown as a user would type it. What is finished is kept,
and reused as long as nothing before it changed.
"""

from __future__ import annotations

import json
import shlex
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from PIL.PngImagePlugin import PngInfo
from rich.markup import escape

from pmod_cli import __version__
from pmod_cli.demo import commands, data, tight, world
from pmod_cli.demo.commands import BATCH, Command
from pmod_cli.extras import require, require_if_installed
from pmod_cli.output.errors import PmodError
from pmod_cli.output.files import copy_folder, locked, open_folder, replacing, tag, write_json
from pmod_cli.output.marks import TAG
from pmod_cli.output.reading import read_json, read_json_lines
from pmod_cli.output.text import plain

BASELINE = Path(__file__).parent / "assets" / "baseline"
"""The trained baseline that travels with the package (see ``docs/demo.md``)."""

TASK, SHUFFLED = "pmod_demo", "pmod_demo_shuffled"
QUESTION = "How many shapes are there?"
"""Asked about the picture whose patches are drawn; the model needs all of the picture for it."""

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
    """How large the demo is: pictures to fine-tune on and to evaluate on, and the most optimizer steps of a model."""

    train_images: int = 1600
    heldout_images: int = 120
    steps: int = 100


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
    from pmod_cli.demo.plot import plot_selection
    from pmod_cli.demo.summary import accuracy, retention, summarize
    from pmod_cli.report import write_report

    models, steps = folder / "models", _Steps(folder / "steps", announce)
    made = steps.run("data", vars(settings), lambda: _make_data(folder, settings))
    shipped = [(path.name, sha256(path.read_bytes()).hexdigest()) for path in sorted(BASELINE.iterdir())]
    steps.run("baseline", shipped, lambda: _copy_baseline(models / "baseline"))
    files = {
        "json": folder / "report.json",
        "selection": folder / "selection.png",
        "layers": folder / "layers.png",
        "kept_patches": folder / "kept_patches.png",
        "visualize": folder / "visualize.html",
        "report": folder / "report.html",
    }
    show = progress or (lambda *_: None)
    results = {
        name: steps.run(name, command.words, command.action, needs, command.words[0])
        for name, needs, command in _commands(folder, settings, files, show)
    }
    accuracies = {label: accuracy(results[name]) for label, (name, *_) in EVALUATIONS.items()}
    kept = retention(results["visualize"])
    scores = {name: _scores(folder / "eval" / step) for step, name in tight.EVALUATED.items()}
    control = _scores(folder / "eval" / EVALUATIONS[LABELS["dense-control"]][0])
    profiles = {budget: results[f"{budget}-profile"] for budget in tight.SCHEDULES}
    budgets = tight.summarize(scores, control, profiles)
    report = summarize(accuracies, results["profile"], kept, made["guessing"], BATCH, budgets) | {
        "seconds": steps.seconds,
        "wall_seconds": sum(steps.seconds.values()),
        "batch": BATCH,
        "settings": vars(settings),
        "models": {str(models / name): label for name, label in (LABELS | tight.LABELS).items()},
        "files": {name: str(path) for name, path in files.items()},
    }
    plot_selection(report, files["selection"])
    write_json(files["json"], tag("demo") | report)  # before the page, which takes the models' names from it
    write_report([folder], files["report"], force=True, include_path=folder / "tasks")
    return report


def _commands(
    folder: Path, settings: DemoSettings, files: dict[str, Path], show: Callable[[str, int, int], None]
) -> Iterator[tuple[str, list[str], Command]]:
    """Name of each step that is a command, the steps that it builds on, and the command."""
    models, tasks, picture = folder / "models", folder / "tasks", folder / "data" / "example.png"
    baseline, control, start, tuned = (models / name for name in LABELS)
    train, images = folder / "data" / "train" / "train.json", folder / "data" / "train" / "images"
    yield "convert", ["baseline"], commands.convert(baseline, start)
    # Half as many as where few tokens are kept: here both models answer everything from the start.
    limit = [f"train.max_steps={-(-settings.steps // 2)}"]
    for name, need, model, output in (
        ("finetune-pmod", "convert", start, tuned),
        ("finetune-dense", "baseline", baseline, control),
    ):
        yield (
            name,
            ["data", need],
            commands.finetune(model, output, train, images, limit, partial(show, name)),
        )
    fine_tuned = ["finetune-pmod", "finetune-dense"]
    yield "profile", fine_tuned, commands.profile(tuned, control, files["layers"])
    yield from tight.make(models, train, images, settings.steps, show)
    evaluated = list(EVALUATIONS.values())
    evaluated += [(step, name, name, TASK) for step, name in tight.EVALUATED.items()]
    for name, need, model_name, task in evaluated:
        output = folder / "eval" / name
        command = commands.evaluate(models / model_name, task, tasks, output, partial(show, name))
        yield name, ["data", need], command
    page = files["visualize"]
    drawn = commands.visualize(tuned, control, picture, QUESTION, files["kept_patches"], page)
    yield "visualize", ["data", *fine_tuned], drawn


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


def _scores(output: Path) -> dict[str, float]:
    """Score, 0 or 1, of each held-out question of an evaluation, by its id."""
    rows = read_json_lines(output / "samples" / f"{TASK}.jsonl")
    return {row["doc"]["question_id"]: row["model"]["score"] for row in rows}


def _copy_baseline(destination: Path) -> dict[str, str]:
    with data.replacing_folder(destination) as partial:
        copy_folder(BASELINE, partial)
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
