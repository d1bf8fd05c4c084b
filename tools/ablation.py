"""The paper's choices against others, on the demo's model: schedule, weight norm, and which tokens are weighted.

Each variant is converted, fine-tuned by ``pmod finetune``'s own code, and judged on the demo's 600 held-out questions,
once per seed. All keep the same mean share of vision tokens. What is done is kept, so an interrupted run goes on::

    python tools/ablation.py ablation                     # trains 6 models per seed, half a minute each
    python tools/ablation.py ablation --write docs/ablation.md    # puts what is measured into the page
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from pmod_cli.calibration.bench import Bench, Kept
from pmod_cli.calibration.measure import judge
from pmod_cli.calibration.questions import Question
from pmod_cli.calibration.subject import Subject
from pmod_cli.conversion.calibrated import CheckpointBase
from pmod_cli.conversion.convert import convert
from pmod_cli.conversion.plan import plan_conversion
from pmod_cli.demo.data import heldout_samples, write_training_data
from pmod_cli.demo.job import BASELINE
from pmod_cli.generation import VisionLanguageModel
from pmod_cli.modeling import layer as layers
from pmod_cli.modeling.routing import Routing
from pmod_cli.modeling.schedule import Ratios, constant, mean_retention, shifted_cosine, shifted_linear
from pmod_cli.prompts import Prompt
from pmod_cli.recipe import load_recipe
from pmod_cli.training.finetune import finetune

LAYERS, RETENTION, FLOOR = 8, 0.25, 0.02
"""Decoder layers of the demo's model, the mean share of vision tokens that every variant keeps (at the paper's 0.54 all
of them answer everything), and the least that a layer keeps."""

VARIANTS: dict[str, tuple[str, list[str], bool]] = {
    "p-MoD: cosine decay, tanh, all weighted": ("cosine", [], True),
    "linear decay": ("linear", [], True),
    "constant ratio": ("constant", [], True),
    "sigmoid": ("cosine", ["mod.weight_norm=sigmoid", "mod.weight_bias=0.9"], True),
    "no norm": ("cosine", ["mod.weight_norm=none"], True),
    "kept tokens weighted alone": ("cosine", [], False),
}
"""By name: the shape of the schedule, what is set in the recipe, and whether skipped tokens are weighted too. Every
variant's weights start at 1: the sigmoid's is 0.5 at the start."""

MARKS = ("<!-- measured -->", "<!-- end -->")
"""Between them the page has the table."""


class KeptWeighted(Routing):
    """Skipped tokens are passed on as they are."""

    def __init__(self, layer: Any, hidden_states: torch.Tensor, *args: Any) -> None:
        super().__init__(layer, hidden_states, *args)
        self.passed_on = hidden_states.clone()


@contextlib.contextmanager
def weighting(everything: bool) -> Iterator[None]:
    """Models weight all vision tokens, or the kept ones alone, while the block runs."""
    before: Any = layers.Routing
    vars(layers)["Routing"] = before if everything else KeptWeighted
    try:
        yield
    finally:
        vars(layers)["Routing"] = before


def schedule(shape: str) -> Ratios:
    """The ratios of a shape at `RETENTION`; a constant one begins after the first layer, which stays dense."""
    if shape == "constant":
        ratio = (RETENTION * LAYERS - 1) / (LAYERS - 1)
        return constant(LAYERS, ratio=ratio, first_layer=1, last_layer=LAYERS - 1)
    decay = shifted_cosine if shape == "cosine" else shifted_linear
    low, high = -0.5, 0.5
    for _ in range(40):
        shift = (low + high) / 2
        dear = mean_retention(decay(LAYERS, shift=shift, floor=FLOOR)) > RETENTION
        low, high = (low, shift) if dear else (shift, high)
    return decay(LAYERS, shift=low, floor=FLOOR)


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--write", type=Path, help="a page with the two marks; nothing is trained")
    args = parser.parse_args()
    logging.disable_progress_bar()
    args.folder.mkdir(parents=True, exist_ok=True)
    results = args.folder / f"results-{args.steps}.json"
    found: dict[str, dict[str, list[float]]] = json.loads(results.read_text()) if results.is_file() else {}
    if args.write is None:
        train = args.folder / "train" / "train.json"
        if not train.is_file():
            write_training_data(args.folder / "train", 400)
        bench = _bench(args.folder)
        for seed in range(args.seeds):
            for name in VARIANTS:
                if str(seed) not in found.setdefault(name, {}):
                    found[name][str(seed)] = _run(name, seed, args.steps, args.folder, train, bench)
                    results.write_text(json.dumps(found, indent=1))
                    print(f"seed {seed}, {name}: {found[name][str(seed)]}", flush=True)
    text = table(found)
    if args.write is None:
        print(text)
        return
    head, rest = args.write.read_text(encoding="utf-8").split(MARKS[0])
    tail = rest.split(MARKS[1])[1]
    args.write.write_text(f"{head}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{tail}", encoding="utf-8")


def table(found: dict[str, dict[str, list[float]]]) -> str:
    """Means over the seeds, with the smallest and largest."""
    lines = ["| variant | as the dense model, % | KL divergence | seeds |", "|---|---|---|---|"]
    for name, seeds in found.items():
        if not seeds:
            continue
        agreement, divergence = np.array(list(seeds.values())).T
        cells = [
            f"{values.mean():.{digits}f} ({values.min():.{digits}f} to {values.max():.{digits}f})"
            for values, digits in ((100 * agreement, 1), (divergence, 3))
        ]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {len(seeds)} |")
    return "\n".join(lines)


def _bench(folder: Path) -> Bench:
    asked = [
        Question(Prompt(each.question, (each.image,)), each.question_id.split("-")[0])
        for each in heldout_samples(120)
    ]
    subject = Subject.load(CheckpointBase.open(BASELINE), "float32", "cpu")
    (answers := folder / "answers").mkdir(parents=True, exist_ok=True)
    return Bench.answer(subject, {"judge": asked}, Kept(answers), lambda *_: None, 50, 8)


def _run(name: str, seed: int, steps: int, folder: Path, train: Path, bench: Bench) -> list[float]:
    """Agreement with the dense model's greedy answers, and KL divergence from it."""
    shape, changes, everything = VARIANTS[name]
    ratios = json.dumps(schedule(shape))
    settings = [f"train.max_steps={steps}", f"train.seed={seed}", "train.save_steps=100000"]
    recipe = load_recipe("demo", ["mod.schedule=explicit", f"mod.ratios={ratios}", *changes, *settings])
    start, tuned = folder / "start", folder / "tuned"
    convert(plan_conversion(BASELINE, recipe=recipe), start, force=True)
    with weighting(everything):
        finetune(str(start), str(train), train.parent / "images", tuned, recipe=recipe, force=True)
        model = VisionLanguageModel.load(str(tuned), dtype="float32", device="cpu").model
        with torch.inference_mode():
            outcome = judge(model, bench.batches["judge"])
    return [float(outcome.agreement.mean()), float(outcome.divergence.mean())]


if __name__ == "__main__":
    main()
