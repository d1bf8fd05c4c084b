"""The whole job on the embedded example: baseline, convert, fine-tune, profile, evaluate, compare.

Every step goes through the public commands, as a user would type them.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmod_cli.demo import data, world
from pmod_cli.demo.steps import Steps
from pmod_cli.evaluation.catalogue import import_lmms_eval
from pmod_cli.extras import require, require_if_installed
from pmod_cli.modeling.schedule import kept_tokens, mean_retention

BASELINE = Path(__file__).parent / "assets" / "baseline"
"""The trained baseline that travels with the package (see ``docs/demo.md``)."""

TASK = "pmod_demo"
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

GUESSING_MARGIN = 5.0
"""Points above text-only guessing that the shuffled baseline may score: two standard errors of the sample."""


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


def run_demo(folder: Path, settings: DemoSettings, announce: Callable[[str], None]) -> dict[str, Any]:
    """Run the demo, or what is left of it.

    Args:
        folder: Everything goes under it.
        settings: Its size.
        announce: Called with a line of (rich) text before each step.

    Returns:
        The report, which is also written to ``folder/report.json``: ``rows`` (one a model), ``kinds``,
        ``targets`` (each with ``met``), ``seconds`` by step, ``retention``, ``files``.

    Raises:
        MissingExtraError: See `check_packages`; nothing has been made then.
        BrokenPackageError: Likewise.
    """
    check_packages()
    folder = folder.resolve()
    steps = Steps(folder, announce)
    models, evaluations = folder / "models", folder / "eval"

    made = steps.run("data", vars(settings), lambda: _make_data(folder, settings))
    baseline = models / "baseline"
    steps.run("baseline", _fingerprint(BASELINE), lambda: _copy_baseline(baseline))
    steps.command(
        "convert", ["convert", baseline, models / "pmod-start", "--recipe", "demo", "--force"], ["baseline"]
    )

    def finetune(name: str, source: Path, output: Path, need: str) -> None:
        arguments = [
            "--data",
            made["train"],
            "--images",
            made["images"],
            "--output",
            output,
            "--recipe",
            "demo",
        ]
        limit = ["--set", f"train.max_steps={settings.steps}", "--force"]
        steps.command(name, ["finetune", source, *arguments, *limit], ["data", need])

    finetune("finetune-pmod", models / "pmod-start", models / "pmod", "convert")
    finetune("finetune-dense", baseline, models / "dense-control", "baseline")

    tuned = ["finetune-pmod", "finetune-dense"]
    how = ["--latency", "--dtype", "float32", "--new-tokens", "16", "--batch", str(BATCH)]
    control = str(models / "dense-control")
    profiled = steps.command("profile", ["profile", models / "pmod", "--baseline", control, *how], tuned)

    def evaluate(name: str, model: Path, task: str, needs: list[str]) -> dict[str, Any]:
        arguments = ["--tasks", task, "--include-path", made["tasks"], "--batch-size", str(BATCH)]
        result = steps.command(
            name, ["eval", model, *arguments, "--output", evaluations / name], ["data", *needs]
        )
        return _accuracy(result)

    accuracies = {
        "baseline": evaluate("eval-baseline", baseline, TASK, ["baseline"]),
        "baseline, images shuffled": evaluate("eval-shuffled", baseline, f"{TASK}_shuffled", ["baseline"]),
        "dense, fine-tuned (control)": evaluate(
            "eval-dense", models / "dense-control", TASK, ["finetune-dense"]
        ),
        "p-MoD, before fine-tuning": evaluate("eval-pmod-start", models / "pmod-start", TASK, ["convert"]),
        "p-MoD, fine-tuned": evaluate("eval-pmod", models / "pmod", TASK, ["finetune-pmod"]),
    }
    pages = {"kept_patches": folder / "kept_patches.png", "visualize": folder / "visualize.html"}
    drawn: list[str | Path] = [
        "-o",
        pages["kept_patches"],
        "--html",
        pages["visualize"],
        "--max-new-tokens",
        "8",
        "--force",
    ]
    asked = ["--image", made["picture"], "--prompt", QUESTION, "--baseline", control]
    seen = steps.command("visualize", ["visualize", models / "pmod", *asked, *drawn], ["data", *tuned])
    retention = _retention(seen)
    report = _report(accuracies, profiled, retention, made["guessing"])
    report["seconds"] = steps.seconds
    report["wall_seconds"] = sum(steps.seconds.values())
    report["batch"] = BATCH
    report["settings"] = vars(settings)
    report["models"] = {str(models / name): label for name, label in LABELS.items()}
    page = folder / "report.html"
    report["files"] = {
        "json": str(folder / "report.json"),
        "layers": str(_draw_layers(folder / "layers.png", profiled, retention)),
        **{name: str(path) for name, path in pages.items()},
        "report": str(page),
    }
    temporary = folder / ".report.json"
    temporary.write_text(json.dumps(report, indent=2))
    temporary.replace(folder / "report.json")  # before the page, which takes the models' names from it
    from pmod_cli.report import write_report

    write_report([folder], page, force=True)
    return report


def check_packages() -> None:
    """Import every optional package that a later step needs: none of them should fail after minutes of training.

    Raises:
        MissingExtraError: One is not installed.
        BrokenPackageError: One is installed and cannot be imported.
    """
    import_lmms_eval()
    require("fvcore")
    require("matplotlib")
    require_if_installed("peft")  # transformers' Trainer imports it wherever it is


def _make_data(folder: Path, settings: DemoSettings) -> dict[str, Any]:
    """Draw the pictures and write them in both forms; returns where they are."""
    from pmod_cli.evaluation.tasks import write_task

    train, images = data.write_training_data(folder / "data" / "train", settings.train_images)
    tasks = folder / "tasks"
    for name, shuffle in ((TASK, False), (f"{TASK}_shuffled", True)):
        questions = data.write_heldout(folder / "data" / name, settings.heldout_images, shuffle=shuffle)
        write_task(tasks, name, questions, world.KINDS)
    samples = data.heldout_samples(settings.heldout_images)
    picture = folder / "data" / "example.png"
    # Two shapes show more than one.
    example = next((sample for sample in samples if sample.answer == "two"), samples[0])
    example.image.save(picture)
    return {
        "train": str(train),
        "images": str(images),
        "tasks": str(tasks),
        "picture": str(picture),
        "guessing": _guessing_level(train, samples),
    }


def _guessing_level(train: Path, samples: list[data.Sample]) -> float:
    """Accuracy, in points, of always giving the training data's most frequent answer to the same question."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for record in json.loads(train.read_text()):
        turns = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            counts[question][answer] += 1
    hits = [
        sample.question in counts and counts[sample.question].most_common(1)[0][0] == sample.answer
        for sample in samples
    ]
    return 100 * sum(hits) / len(hits)


def _copy_baseline(destination: Path) -> dict[str, Any]:
    temporary = destination.with_name(f".{destination.name}")
    for stale in (temporary, destination):
        shutil.rmtree(stale, ignore_errors=True)
    shutil.copytree(BASELINE, temporary)
    temporary.rename(destination)
    return {"model": str(destination)}


def _fingerprint(folder: Path) -> list[tuple[str, str]]:
    from hashlib import sha256

    return [(path.name, sha256(path.read_bytes()).hexdigest()) for path in sorted(folder.iterdir())]


def _accuracy(result: dict[str, Any]) -> dict[str, float]:
    """Points by kind and overall, from what ``pmod eval --json`` says."""
    (metrics,) = result["tasks"][0]["model"]["metrics"].values()
    return {kind: _points(metrics, kind) for kind in ("exact_match", *world.KINDS)}


def _points(metrics: dict[str, float], name: str) -> float:
    # lmms-eval writes "metric,filter".
    return 100 * next(value for key, value in metrics.items() if key.split(",")[0] == name)


def _retention(seen: dict[str, Any]) -> dict[str, Any]:
    """What each layer of the fine-tuned model really kept of one picture, and what its schedule says."""
    number = seen["vision_tokens"]
    ratios = [layer["ratio"] for layer in seen["layers"]]
    return {
        "vision_tokens": number,
        "ratios": ratios,
        "mean_ratio": mean_retention(ratios),
        "kept": [layer["kept"] for layer in seen["layers"]],
        "scheduled": [number if ratio is None else kept_tokens(number, ratio) for ratio in ratios],
    }


def _report(
    accuracies: dict[str, dict[str, float]],
    profiled: dict[str, Any],
    retention: dict[str, Any],
    guessing: float,
) -> dict[str, Any]:
    costs = {role: _cost(profiled, role) for role in ("pmod", "dense")}
    rows = []
    for name, accuracy in accuracies.items():
        cost = costs["pmod" if name.startswith("p-MoD") else "dense"]
        rows.append({"model": name, "accuracy": accuracy, **cost})
    overall = {name: accuracy["exact_match"] for name, accuracy in accuracies.items()}
    pmod, control = overall["p-MoD, fine-tuned"], overall["dense, fine-tuned (control)"]
    shuffled = overall["baseline, images shuffled"]
    measured = sum(map(len, retention["kept"])) / len(retention["kept"]) / retention["vision_tokens"]
    scheduled = sum(retention["scheduled"]) / len(retention["scheduled"]) / retention["vision_tokens"]
    targets = [
        _target(
            "baseline on held-out pictures", overall["baseline"], "at least 90", overall["baseline"] >= 90
        ),
        _target(
            "baseline with shuffled pictures",
            shuffled,
            f"at most {guessing + GUESSING_MARGIN:.1f} (guessing {guessing:.1f})",
            shuffled <= guessing + GUESSING_MARGIN,
        ),
        _target("p-MoD against the dense control", pmod - control, "at least -2", pmod >= control - 2),
        _target(
            "mean vision-token retention, %",
            100 * measured,
            f"the schedule's {100 * scheduled:.2f}",
            [len(kept) for kept in retention["kept"]] == retention["scheduled"],
        ),
    ]
    return {
        "rows": rows,
        "kinds": list(world.KINDS),
        "guessing": guessing,
        "ratios": profiled["ratios"],
        "retention": {key: retention[key] for key in ("vision_tokens", "ratios", "mean_ratio", "scheduled")},
        "targets": targets,
        "met": all(target["met"] for target in targets),
    }


def _target(name: str, value: float, wanted: str, met: bool) -> dict[str, Any]:
    return {"name": name, "value": value, "wanted": wanted, "met": met}


def _cost(profiled: dict[str, Any], role: str) -> dict[str, Any]:
    """FLOPs and cache of one sample; seconds of a batch's prefill and of one decode step of the batch."""
    counted, measured = profiled[role], profiled["latency"]["models"][role]
    return {
        "prefill_flops": counted["prefill"]["flops"] / BATCH,
        "kv_bytes": measured["kv_cache"]["prefill_bytes"] / BATCH,
        "prefill_seconds": measured["seconds"]["prefill"]["median"],
        "decode_seconds_per_token": BATCH / measured["decode_tokens_per_second"],
        "parameters": counted["parameters"]["total"],
    }


def _draw_layers(path: Path, profiled: dict[str, Any], retention: dict[str, Any]) -> Path:
    from pmod_cli.demo.pictures import draw_layers

    flops = {
        role: [layer["flops"] / BATCH for layer in profiled[role]["prefill"]["layers"]]
        for role in ("dense", "pmod")
    }
    draw_layers(path, retention["ratios"], flops)
    return path
