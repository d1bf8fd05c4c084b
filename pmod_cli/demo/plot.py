"""The demo's picture: accuracy against FLOPs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pmod_cli import plots


@plots.look()
def plot_selection(report: dict[str, Any], path: Path) -> None:
    """Write the picture of a demo's report (`tight.summarize`).

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    drawn, [[axis]] = plots.figure(1, 1, (6.4, 3.6))
    rows = {row["model"]: row for row in report["rows"]}
    budgets = report["tight"]
    names = [row["model"] for row in budgets[0]["rows"]]
    for number, (name, colour, marker) in enumerate(zip(names, plots.SERIES, plots.MARKERS, strict=False)):
        points = [
            (budget["flops"], row["accuracy"])
            for budget in budgets
            for row in budget["rows"]
            if row["model"] == name
        ]
        # Side by side: their intervals would hide one another.
        shares = [100 * flops + 0.5 * (number - (len(names) - 1) / 2) for flops, _ in points]
        means = [accuracy["points"] for _, accuracy in points]
        bars = [
            [abs(accuracy[end] - accuracy["points"]) for _, accuracy in points] for end in ("low", "high")
        ]
        hollow = {"markerfacecolor": "white"} if "random" in name else {}
        axis.errorbar(shares, means, bars, capsize=2, fmt=marker, color=colour, label=name, **hollow)
    for budget in budgets:
        above = (100 * budget["flops"], 1.01)
        axis.annotate(budget["name"], above, xycoords=("data", "axes fraction"), ha="center", fontsize=8.5)
    paper = report["ratios"]["prefill_flops"]
    for name, text, share, marker in (
        ("dense, fine-tuned (control)", "dense", 1.0, "s"),
        ("p-MoD, fine-tuned", "the paper's schedule, fine-tuned", paper, "o"),
    ):
        point = (100 * share, rows[name]["accuracy"]["exact_match"])
        axis.plot(*point, marker, color=plots.DENSE, markersize=7)
        axis.annotate(text, point, (0, -14), textcoords="offset points", ha="center", fontsize=8.5)
    axis.set(xlabel="prefill FLOPs, % of dense", ylabel="held-out questions right, %", ylim=(None, 101.5))
    axis.legend(loc="lower right")
    drawn.suptitle("What the choice of tokens is worth on the demo's model")
    plots.save(drawn, path, title="pmod demo", program="pmod demo", dpi=150)
