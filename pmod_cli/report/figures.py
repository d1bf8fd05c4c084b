"""The report's drawings: accuracy against FLOPs, training curves, retention by layer."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pmod_cli import plots
from pmod_cli.output.text import plain
from pmod_cli.output.units import prefix
from pmod_cli.report.collect import Training
from pmod_cli.report.document import Figure

_LONGEST = 60
"""Characters of a name in a legend."""


@dataclass(frozen=True)
class Point:
    """A model's prefill FLOPs of one sample, and its accuracy in points with half the 95 % interval as the error."""

    label: str
    flops: float
    accuracy: float
    error: float | None
    pmod: bool


@plots.look()
def accuracy_figure(
    ours: Sequence[Point], published: Sequence[Point], *, together: bool, what: str, caption: str
) -> Figure:
    """Accuracy over prefill FLOPs, one point per model; ``what`` says which accuracy.

    Published points stand in the same plot if both are scores on the same tasks (``together``), else in one beside it.
    """
    panels = [[*ours, *published]] if together or not published else [list(ours), list(published)]
    height = 3.5 + 0.2 * (max(map(len, panels)) + 1) // 2
    drawn, axes = plots.figure(1, len(panels), (4.6 * len(panels), height))
    for number, (axis, points) in enumerate(zip(axes[0], panels, strict=True)):
        unit, factor = prefix(max(point.flops for point in points))
        for place, point in enumerate(points):
            hollow = together and place >= len(ours)
            above = sum(_same_place(other, point) for other in points[place + 1 :])
            colour = plots.PMOD if point.pmod else plots.DENSE
            axis.errorbar(
                point.flops / factor,
                point.accuracy,
                yerr=point.error,
                fmt=plots.MARKERS[place % len(plots.MARKERS)],
                # Models at the same place: the one below shows as a rim around the one above.
                markersize=7 + 6 * above,
                markerfacecolor="none" if hollow else colour,
                markeredgecolor=colour if hollow else "white",
                markeredgewidth=1.5 if hollow else 0.8,
                ecolor=colour,
                elinewidth=1.2,
                capsize=3,
                label=_label(point.label),
                linestyle="none",
            )
        axis.set(
            xlabel=f"prefill {unit}FLOPs per sample", ylabel="mean of 14 tasks" if number else _label(what)
        )
        axis.set_xlim(0, 1.12 * max(point.flops for point in points) / factor)
        low = min(point.accuracy - (point.error or 0) for point in points)
        high = max(point.accuracy + (point.error or 0) for point in points)
        room = max(0.25 * (high - low), 1.5)
        axis.set_ylim(low - room, high + room if high > 100 else min(high + room, 100 + 0.1 * room))
        if len(panels) == 2:
            axis.set_title("published (arXiv 2412.04449)" if number else "these runs")
        columns = 2 if len(points) > 2 else 1
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=columns, handletextpad=0.4)
    return _finish(drawn, "accuracy-flops", caption)


def _same_place(first: Point, second: Point) -> bool:
    return abs(first.flops / second.flops - 1) < 0.02 and abs(first.accuracy - second.accuracy) < 0.5


@plots.look()
def training_figure(trainings: Sequence[tuple[str, Training]], caption: str) -> Figure:
    """Loss, gradient norm and, where routers were watched, how much they still changed; trainings are labelled."""
    curves = {"loss": "loss", "grad_norm": "gradient norm"}
    if any(len(_points(training, "fate")) > 1 for _, training in trainings):
        curves["fate"] = "fate changed, % of vision tokens"
    drawn, axes = plots.figure(1, len(curves), (3.2 * len(curves), 2.9))
    kinds: list[bool] = []
    for index, (label, training) in enumerate(trainings):
        kinds.append(_routes(training))
        # The dense and the p-MoD model's colours for the first of each, then others.
        colour = plots.SERIES[1 + (index - 1) % (len(plots.SERIES) - 2)]
        if kinds.count(kinds[-1]) == 1:
            colour = plots.PMOD if kinds[-1] else plots.DENSE
        look = {"color": colour, "label": _label(label), "linestyle": ("-", "--", "-.", ":")[index % 4]}
        for axis, key in zip(axes[0], curves, strict=True):
            if points := _points(training, key):
                marker = plots.MARKERS[index % len(plots.MARKERS)] if key == "fate" else None
                axis.plot(*zip(*points, strict=True), marker=marker, **look)
    for axis, title in zip(axes[0], curves.values(), strict=True):
        axis.set(title=title, xlabel="step")
        axis.set_ylim(bottom=0)
    axes[0][0].legend()
    return _finish(drawn, "training", caption)


def _points(training: Training, key: str) -> list[tuple[int, float]]:
    """A curve over the steps; ``fate`` is the percentage of vision tokens whose fate changed, mean over layers."""
    if key != "fate":
        return [(row["step"], row[key]) for row in training.rows if row.get(key) is not None]
    found = []
    for row in training.rows:
        shares = [layer.get("changed") for layer in row.get("routers") or ()]
        known = [share for share in shares if share is not None]  # the first look has none before it
        if known:
            found.append((row["step"], 100 * sum(known) / len(known)))
    return found


def _routes(training: Training) -> bool:
    """Whether a p-MoD model was trained."""
    parts = (training.summary.get("result") or {}).get("parts") or []
    return any(part["part"] == "routers" for part in parts) or any("routers" in row for row in training.rows)


@plots.look()
def retention_figure(ratios: Sequence[float | None], caption: str) -> Figure:
    """Share of the vision tokens that each layer keeps."""
    drawn, [[axis]] = plots.figure(1, 1, (6.4, 2.1))
    plots.retention_bars(axis, ratios, [1 if ratio is None else ratio for ratio in ratios])
    return _finish(drawn, "retention", caption)


def _label(name: str) -> str:
    """A name in a legend, cut where it is long; after a space, since matplotlib leaves out what begins with ``_``."""
    shown = " ".join(plain(name).split())
    return f" {shown}" if len(shown) <= _LONGEST else f" {shown[: _LONGEST - 1]}…"


def _finish(drawn: Any, name: str, caption: str) -> Figure:
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=160, metadata={"Software": "pmod report"})
    return Figure(name, caption, buffer.getvalue(), plots.inline_svg(drawn, f"{name}: {caption}"))
