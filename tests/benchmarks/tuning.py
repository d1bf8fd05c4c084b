"""What tuning adds to a calibrated checkpoint of the demo's model: each set of trained parts, from the dense answers
or from the labels.

Converts with the schedule, calibrates, tunes by ``pmod finetune``'s own code, and judges on held-out questions: KL
divergence from the dense model, greedy answers as dense, and the paired difference to the calibrated start. What is
done is kept in the folder, so that a run that was interrupted goes on::

    python tests/benchmarks/tuning.py tuning            # about 20 minutes on two cores; --steps 4 for a glance
    python tests/benchmarks/tuning.py tuning --schedule "dense x 2, 0.02 x 6"
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from pmod_cli.calibration.bench import Bench, Kept
from pmod_cli.calibration.calibrate import calibrate
from pmod_cli.calibration.measure import Outcome, judge
from pmod_cli.calibration.options import CalibrateOptions
from pmod_cli.calibration.subject import Subject
from pmod_cli.conversion.calibrated import CheckpointBase
from pmod_cli.conversion.convert import convert
from pmod_cli.conversion.plan import plan_conversion
from pmod_cli.demo.data import write_training_data
from pmod_cli.demo.job import BASELINE
from pmod_cli.generation import VisionLanguageModel
from pmod_cli.recipe import LoraSettings, load_recipe
from pmod_cli.training.finetune import finetune
from tests.benchmarks.coverage import SCHEDULES, questions

LORA = {"lora": LoraSettings(r=16, alpha=32, dropout=0.0), "learning_rate": 1e-3}
RATE = {"router_learning_rate": 2e-5}
ROUTERS = {"parts": ("routers",), "learning_rate": 2e-5}
BOTH = {"parts": ("routers", "lora"), **LORA, **RATE}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "[routers], distilled": ("calibrated", {**ROUTERS, "distill": True}),
    "[routers, lora], distilled": ("calibrated", {**BOTH, "distill": True}),
    "[routers], labels": ("calibrated", ROUTERS),
    "[routers, projector], labels": (
        "calibrated",
        {"parts": ("routers", "projector"), "learning_rate": 2e-4, **RATE},
    ),
    "[routers, lora], labels": ("calibrated", BOTH),
    "everything, labels": ("calibrated", RATE),
    "everything, labels, from new routers": ("start", {}),
    "[routers], distilled, from new routers": ("start", {**ROUTERS, "distill": True}),
}
"""By name: the checkpoint that it starts from, and what is changed in the recipe ``demo``, past its checks: some of it
is not offered."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--schedule", choices=SCHEDULES, default="dense, 0.08 x 7")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only", default="", help="variants whose name has this in it")
    parser.add_argument("--pictures", type=int, default=120, help="held-out pictures, five questions each")
    args = parser.parse_args()
    logging.disable_progress_bar()
    folder: Path = args.folder / args.schedule.replace(" ", "").replace(",", "-")
    folder.mkdir(parents=True, exist_ok=True)
    train, images = folder / "train" / "train.json", folder / "train" / "images"
    if not train.is_file():
        write_training_data(folder / "train", 400)
    if not (folder / "start").is_dir():
        ratios = json.dumps(SCHEDULES[args.schedule])
        recipe = load_recipe("demo", ["mod.schedule=explicit", f"mod.ratios={ratios}"])
        convert(plan_conversion(BASELINE, recipe=recipe), folder / "start")
    if not (folder / "calibrated").is_dir():
        options = CalibrateOptions(
            model=str(folder / "start"),
            data=str(train),
            images=images,
            output=folder / "calibrated",
            schedule="own",
        )
        calibrate(options, lambda *_: None)
    subject = Subject.load(CheckpointBase.open(BASELINE), "float32", "cpu")
    asked = {"judge": [question for question, _ in questions(21, args.pictures, "heldout")]}
    (answers := folder / "answers").mkdir(exist_ok=True)
    bench = Bench.answer(subject, asked, Kept(answers), lambda *_: None, 50, 8)
    start = judged(bench, folder / "calibrated")
    told("calibrated", start)
    for name, (source, changes) in VARIANTS.items():
        if args.only not in name:
            continue
        output = folder / name.replace(" ", "")
        found = folder / f"{output.name}.json"
        if not found.is_file():
            recipe, began = load_recipe("demo"), time.perf_counter()
            changes = {"max_steps": args.steps, "save_steps": 10000, **changes}
            recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)})
            finetune(
                str(folder / source), str(train), images, output,
                recipe=recipe, force=True, merge_lora=recipe.train.lora is not None,
            )  # fmt: skip
            outcome = judged(bench, output)
            parts = [outcome.divergence.tolist(), outcome.agreement.tolist(), time.perf_counter() - began]
            found.write_text(json.dumps(parts))
        divergence, agreement, seconds = json.loads(found.read_text())
        outcome = Outcome(np.array(divergence), np.array(agreement))
        gains: list[Any] = [bench.compare("judge", start.divergence, outcome.divergence)]
        gains.append(bench.compare("judge", outcome.agreement, start.agreement))
        told(name, outcome, gains[0], gains[1], seconds)


def judged(bench: Bench, checkpoint: Path) -> Outcome:
    """A checkpoint on the held-out questions."""
    model = VisionLanguageModel.load(str(checkpoint), dtype="float32", device="cpu").model
    with torch.inference_mode():
        return judge(model, bench.batches["judge"])


def told(name: str, outcome: Outcome, less: Any = None, more: Any = None, seconds: float = 0.0) -> None:
    """Print a row."""
    gain = ""
    if less is not None:
        gain = f"  KL less by {less.points:.4f} ({less.low:.4f} to {less.high:.4f})"
        gain += f", as dense {100 * more.points:+.1f} ({100 * more.low:+.1f} to {100 * more.high:+.1f})"
        gain += f", {seconds:.0f} s"
    print(
        f"{name:40}KL {outcome.divergence.mean():.4f}  as dense {100 * outcome.agreement.mean():5.1f} %{gain}",
        flush=True,
    )


if __name__ == "__main__":
    main()
