"""What chooses tokens, without any training: accuracy of the demo's baseline on held-out questions.

Same spread in all layers, random (mean of draws), spread shifted by layer, and routers fitted to the attention of text
with several strengths of coverage; for each the KL divergence from the dense model, and against the best of the three
controls the paired difference with its interval. Run::

    python tests/benchmarks/coverage.py                 # some minutes on two cores; --pictures 20 for a glance
    python tests/benchmarks/coverage.py --json > coverage.json
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from pmod_cli.calibration.bench import Bench, Kept
from pmod_cli.calibration.calibrate import SCALE
from pmod_cli.calibration.questions import Question
from pmod_cli.calibration.selection import Selection, controls, fitted
from pmod_cli.calibration.subject import Subject, stored
from pmod_cli.conversion.calibrated import CheckpointBase
from pmod_cli.demo import world
from pmod_cli.demo.job import BASELINE
from pmod_cli.demo.tight import SCHEDULES as TIGHT
from pmod_cli.modeling.schedule import Ratios
from pmod_cli.prompts import Prompt

SCHEDULES: dict[str, Ratios] = {
    "dense, 0.08 x 7": TIGHT["keep8"],
    "dense x 2, 0.02 x 6": TIGHT["keep2"],
    "dense x 2, 0.3 .. 0.02": [None, None, 0.3, 0.2, 0.1, 0.05, 0.03, 0.02],
}
STRENGTHS = (0, 4, 8, 16)


def questions(seed: int, pictures: int, split: world.Split) -> list[tuple[Question, str]]:
    """Questions of each kind about scenes of a split, with the true answers."""
    rng, found = random.Random(seed), []
    for index in range(pictures):
        scene = world.draw_scene(rng, split)
        picture = world.render(scene)
        for asked in world.ask_each(rng, scene):
            found.append((Question(Prompt(asked.text, (picture,)), f"{seed}-{index}"), asked.answer))
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pictures", type=int, default=120, help="held-out pictures, five questions each")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    asked = {
        "fit": questions(6, max(args.pictures // 2, 8), "train"),
        "choose": questions(7, max(args.pictures // 4, 4), "train"),
        "judge": questions(21, args.pictures, "heldout"),
    }
    subject = Subject.load(base := CheckpointBase.open(BASELINE), "float32", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        kept = Kept(Path(folder))
        only = {part: [question for question, _ in each] for part, each in asked.items()}
        bench = Bench.answer(subject, only, kept, lambda *_: None, 50, 8)
        correct = dense_accuracy(subject, bench, asked["judge"])
        routers = bench.fit()
        selections = [*controls()]
        selections += [stored(fitted(routers, a, SCALE), base.router_dtype) for a in STRENGTHS]
        rows = [row for name in SCHEDULES for row in measured(bench, name, selections)]
    if args.json:
        print(
            json.dumps({"dense_accuracy": correct, "questions": len(asked["judge"]), "rows": rows}, indent=2)
        )
        return
    print(f"dense: {100 * correct:.1f} % of {len(asked['judge'])} held-out questions right")
    for row in rows:
        gain = ""
        if against := row["against"]:
            span = f"{against['low']:.4f} to {against['high']:.4f}"
            gain = f"  KL less than {against['name']} by {against['mean']:.4f} ({span})"
        print(
            f"{row['schedule']:24}{row['selection']:24}as dense {100 * row['agreement']:5.1f} %  "
            f"KL {row['divergence']:.4f}{gain}"
        )


def dense_accuracy(subject: Subject, bench: Bench, asked: list[tuple[Question, str]]) -> float:
    """Share of the dense model's answers that are right."""
    ordered = sorted(asked, key=lambda each: subject.loaded.length(each[0].prompt))
    tokenizer, said = subject.loaded.processor.tokenizer, []
    for batch in bench.batches["judge"]:
        for row, inside in zip(batch.answer, batch.asked, strict=True):
            said.append(tokenizer.decode(row[inside], skip_special_tokens=True).strip())
    return float(np.mean([word == answer for word, (_, answer) in zip(said, ordered, strict=True)]))


def measured(bench: Bench, name: str, selections: list[Selection]) -> list[dict[str, Any]]:
    """One row for each selection; the fitted ones against the best control."""
    ratios = SCHEDULES[name]
    outcomes = {each.name: bench.outcome("judge", ratios, each, "") for each in selections}
    best = min((each.name for each in controls()), key=lambda control: outcomes[control].divergence.mean())
    rows = []
    for selection, outcome in outcomes.items():
        against = None
        if selection.startswith("fitted"):
            found = bench.compare("judge", outcomes[best].divergence, outcome.divergence)
            against = {"name": best, "mean": found.points, "low": found.low, "high": found.high}
        rows.append(
            {
                "schedule": name,
                "selection": selection,
                "agreement": float(outcome.agreement.mean()),
                "divergence": float(outcome.divergence.mean()),
                "against": against,
            }
        )
    return rows


if __name__ == "__main__":
    main()
