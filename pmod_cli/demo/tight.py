"""Tight budgets: what the choice of tokens is worth where few are kept.

At the paper's schedule the demo's model answers everything whatever is kept. Here each way to a p-MoD model stands
beside the same with random tokens, drawn anew for each picture and layer, in training too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmod_cli.demo import commands
from pmod_cli.demo.commands import Command
from pmod_cli.modeling.schedule import Ratios

SCHEDULES: dict[str, Ratios] = {
    "keep8": [None] + [0.08] * 7,
    "keep2": [None, None] + [0.02] * 6,
}
"""Retention ratios by name of the budget: eight of a picture's 100 tokens in each routed layer, and two."""

RANDOM = ["mod.choice=random"]
ROUTERS = ["train.parts=[routers]", "train.distill=true", "train.learning_rate=2e-5"]
ROUTER_STEPS = 0.6
"""Steps of router tuning, of those of fine-tuning: a step costs what a dense one and a pass of the dense model do."""


@dataclass(frozen=True)
class Arm:
    """One way to a p-MoD model.

    Attributes:
        label: What tables call it.
        source: Name of the arm that it starts from; None for the baseline.
        control: Name of the arm that differs in nothing but that its tokens are random; None for controls.
    """

    label: str
    source: str | None = None
    control: str | None = None


ARMS = {
    "fresh": Arm("fresh routers", None, "random"),
    "random": Arm("random tokens"),
    "calibrated": Arm("calibrated", "fresh", "random"),
    "routers": Arm("calibrated, routers tuned", "calibrated", "random"),
    "tuned": Arm("fine-tuned", "fresh", "random-tuned"),
    "random-tuned": Arm("fine-tuned, random tokens", "random"),
}
"""By the end of their folders' names."""

EVALUATED = {f"{budget}-{arm}-eval": f"{budget}-{arm}" for budget in SCHEDULES for arm in ARMS}
"""By step, the model's folder, which its own step is called as."""

LABELS = {f"{budget}-{arm}": f"{ARMS[arm].label}, {budget}" for budget in SCHEDULES for arm in ARMS}
"""By folder."""


def make(
    models: Path, train: Path, images: Path, steps: int, show: Callable[[str, int, int], None]
) -> Iterator[tuple[str, list[str], Command]]:
    """Name of each step that makes a model, the steps that it builds on, and its command.

    Args:
        models: Where the models' folders are.
        train: Training data.
        images: Its pictures.
        steps: Of fine-tuning.
        show: Told the step, how much of it is done, of how much.
    """
    for budget, ratios in SCHEDULES.items():
        for name, arm in ARMS.items():
            step = f"{budget}-{name}"
            source = models / ("baseline" if arm.source is None else f"{budget}-{arm.source}")
            needs, output = ["data", source.name], models / step

            def told(done: int, total: int, step: str = step) -> None:
                show(step, done, total)

            limit = [f"train.max_steps={max(round(ROUTER_STEPS * steps), 1) if name == 'routers' else steps}"]
            if arm.source is None:
                chosen = ["mod.schedule=explicit", f"mod.ratios={json.dumps(ratios, separators=(',', ':'))}"]
                chosen += RANDOM if name == "random" else []
                yield step, ["baseline"], commands.convert(source, output, chosen)
            elif name == "calibrated":
                yield step, needs, commands.calibrate(source, output, train, images, told)
            else:
                limit += ROUTERS if name == "routers" else []
                yield step, needs, commands.finetune(source, output, train, images, limit, told)
        profiled = commands.profile(models / f"{budget}-tuned", models / "baseline")
        yield f"{budget}-profile", [f"{budget}-tuned"], profiled


def summarize(
    scores: dict[str, dict[str, float]], control: dict[str, float], profiles: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """The budgets, each with its arms.

    Args:
        scores: By folder, each held-out question's score, 0 or 1.
        control: The dense control's.
        profiles: By budget.
    """
    from pmod_cli.evaluation.stats import compare_means

    # A question's id begins with its picture's; pictures are drawn, not questions.
    pictures = [question.split("-")[0] for question in control]

    def points(values: dict[str, float], others: dict[str, float] | None = None) -> dict[str, float]:
        rows = [[values[question] for question in control]]
        rows.append([others[question] if others else 0.0 for question in control])
        return {name: 100 * value for name, value in compare_means(pictures, *rows)._asdict().items()}

    budgets = []
    for budget, ratios in SCHEDULES.items():
        rows = []
        for name, arm in ARMS.items():
            own = scores[f"{budget}-{name}"]
            random = scores[f"{budget}-{arm.control}"] if arm.control else None
            rows.append(
                {
                    "model": arm.label,
                    "accuracy": points(own),
                    "over_random": None if random is None else points(own, random),
                    "over_dense": points(own, control),
                }
            )
        costs = profiles[budget]["ratios"]
        cost = {"flops": costs["prefill_flops"], "kv": costs["kv_prefill"]}
        budgets.append({"name": budget, "ratios": ratios, **cost, "rows": rows})
    return budgets


def targets(budgets: list[dict[str, Any]]) -> list[tuple[str, float, str, bool]]:
    """Name, value, what is wanted and whether it is met, of each target: what calibration alone has to reach.

    None for fine-tuning at these budgets: from seed to seed it differs by points.
    """
    label = ARMS["calibrated"].label
    budget = budgets[0]
    row = next(row for row in budget["rows"] if row["model"] == label)
    behind, ahead = row["over_dense"]["points"], row["over_random"]
    wanted = f"above 0 (interval {ahead['low']:.1f} to {ahead['high']:.1f})"
    name = f"{label}, {budget['name']}"
    return [
        (f"{name}, against the dense control", behind, "at least -2", behind >= -2),
        (f"{name}, over random tokens", ahead["points"], wanted, ahead["low"] > 0),
    ]
