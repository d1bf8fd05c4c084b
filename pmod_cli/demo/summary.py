"""What the demo found: the table's rows, and the targets."""

from __future__ import annotations

from typing import Any

from pmod_cli.demo import tight, world
from pmod_cli.modeling.schedule import kept_tokens, mean_retention

GUESSING_MARGIN = 5.0
"""Points above text-only guessing that the shuffled baseline may score: two standard errors of the sample."""


def accuracy(evaluated: dict[str, Any]) -> dict[str, float]:
    """Points by kind and overall (`exact_match`) of an `EvalResult` of the demo's task."""
    (metrics,) = evaluated["tasks"][0]["model"]["metrics"].values()
    # lmms-eval writes "metric,filter".
    points = {name.split(",")[0]: 100 * value for name, value in metrics.items()}
    return {kind: points[kind] for kind in ("exact_match", *world.KINDS)}


def retention(seen: dict[str, Any]) -> dict[str, Any]:
    """What each layer really kept of one picture, by `visualize`, and what its schedule says."""
    number = seen["vision_tokens"]
    ratios = [layer["ratio"] for layer in seen["layers"]]
    return {
        "vision_tokens": number,
        "ratios": ratios,
        "mean_ratio": mean_retention(ratios),
        "scheduled": [number if ratio is None else kept_tokens(number, ratio) for ratio in ratios],
        "kept": [len(layer["kept"]) for layer in seen["layers"]],
    }


def summarize(
    accuracies: dict[str, dict[str, float]],
    profiled: dict[str, Any],
    kept: dict[str, Any],
    guessing: float,
    batch: int,
    budgets: list[dict[str, Any]],
) -> dict[str, Any]:
    """The part of the report that is about the models.

    Args:
        accuracies: Of each row of the table, by its name (see `accuracy`).
        profiled: The profile of the fine-tuned p-MoD model beside the dense control, with latency.
        kept: See `retention`.
        guessing: Accuracy of text-only guessing, in points.
        batch: Samples of the batch that was profiled.
        budgets: See `tight.summarize`.
    """
    costs = {role: _cost(profiled, role, batch) for role in ("pmod", "dense")}
    targets = _targets(
        {name: each["exact_match"] for name, each in accuracies.items()}, kept, guessing, budgets
    )
    return {
        "rows": [
            {"model": name, "accuracy": each, **costs["pmod" if name.startswith("p-MoD") else "dense"]}
            for name, each in accuracies.items()
        ],
        "kinds": list(world.KINDS),
        "guessing": guessing,
        "ratios": profiled["ratios"],
        "retention": {key: value for key, value in kept.items() if key != "kept"},
        "tight": budgets,
        "targets": targets,
        "met": all(target["met"] for target in targets),
    }


def _cost(profiled: dict[str, Any], role: str, batch: int) -> dict[str, Any]:
    """FLOPs and cache of one sample; seconds of a batch's prefill and of one decode step of the batch."""
    counted, measured = profiled[role], profiled["latency"]["models"][role]
    return {
        "prefill_flops": counted["prefill"]["flops"] / batch,
        "kv_bytes": measured["kv_cache"]["prefill_bytes"] / batch,
        "prefill_seconds": measured["seconds"]["prefill"]["median"],
        "decode_seconds_per_token": batch / measured["decode_tokens_per_second"],
        "parameters": counted["parameters"]["total"],
    }


def _targets(
    overall: dict[str, float], kept: dict[str, Any], guessing: float, budgets: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """What the example has to reach: accuracies in points, and the schedule's retention."""
    baseline, shuffled, control, _, tuned = overall.values()
    most = guessing + GUESSING_MARGIN
    tokens = kept["vision_tokens"] * len(kept["kept"])
    measured, scheduled = (100 * sum(kept[key]) / tokens for key in ("kept", "scheduled"))
    upper = f"at most {most:.1f} (guessing {guessing:.1f})"
    same = kept["kept"] == kept["scheduled"]
    rows = [
        ("baseline on held-out pictures", baseline, "at least 90", baseline >= 90),
        ("baseline with shuffled pictures", shuffled, upper, shuffled <= most),
        ("p-MoD against the dense control", tuned - control, "at least -2", tuned - control >= -2),
        ("mean vision-token retention, %", measured, f"the schedule's {scheduled:.2f}", same),
        *tight.targets(budgets),
    ]
    return [dict(zip(("name", "value", "wanted", "met"), row, strict=True)) for row in rows]
