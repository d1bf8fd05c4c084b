"""The report's drawings: accuracy against FLOPs, training curves, retention by layer."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pmod_cli import plots
from pmod_cli.output.units import prefix
from pmod_cli.report.collect import Training
from pmod_cli.report.document import Figure


@dataclass(frozen=True)
class Point:
    """A model in the plane of cost and accuracy.

    Attributes:
        label: Its name.
        flops: Prefill FLOPs of one sample.
        accuracy: In points.
        error: Half the 95 % interval, or None.
        pmod: Whether it is a p-MoD model.
    """

    label: str
    flops: float
    accuracy: float
    error: float | None
    pmod: bool


@plots.look()
def accuracy_figure(
    ours: Sequence[Point], published: Sequence[Point], *, together: bool, what: str, caption: str
) -> Figure:
    """Accuracy over prefill FLOPs, one point a model, published points in the same plot or in one beside it.

    Args:
        ours: Of the runs.
        published: Of the paper; may be empty.
        together: Whether both are scores on the same tasks.
        what: Label of the runs' accuracy.
        caption: Stands below.
    """
    panels = [[*ours, *published]] if together or not published else [list(ours), list(published)]
    drawn, axes = plots.figure(
        1, len(panels), (4.6 * len(panels), 3.5 + 0.2 * (max(map(len, panels)) + 1) // 2)
    )
    for number, (axis, points) in enumerate(zip(axes[0], panels, strict=True)):
        unit, factor = prefix(max(point.flops for point in points))
        for place, point in enumerate(points):
            theirs = together and place >= len(ours)
            later = [p for p in points[place + 1 :] if _same_place(p, point)]
            colour = plots.PMOD if point.pmod else plots.DENSE
            axis.errorbar(
                point.flops / factor,
                point.accuracy,
                yerr=point.error,
                fmt=plots.MARKERS[place % len(plots.MARKERS)],
                # Models at the same place: the one below shows as a rim around the one above.
                markersize=7 + 6 * len(later),
                markerfacecolor="none" if theirs else colour,
                markeredgecolor=colour if theirs else "white",
                markeredgewidth=1.5 if theirs else 0.8,
                ecolor=colour,
                elinewidth=1.2,
                capsize=3,
                label=point.label,
                linestyle="none",
            )
        axis.set(xlabel=f"prefill {unit}FLOPs a sample", ylabel=what if number == 0 else "mean of 14 tasks")
        axis.set_xlim(0, 1.12 * max(point.flops for point in points) / factor)
        low = min(point.accuracy - (point.error or 0) for point in points)
        high = max(point.accuracy + (point.error or 0) for point in points)
        room = max(0.25 * (high - low), 1.5)
        top = high + room if high > 100 else min(high + room, 100 + 0.1 * room)
        axis.set_ylim(low - room, top)
        if len(panels) == 2:
            axis.set_title("these runs" if number == 0 else "published (arXiv 2412.04449)")
        columns = 2 if len(points) > 2 else 1
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=columns, handletextpad=0.4)
    return finish(drawn, "accuracy-flops", caption)


@plots.look()
def training_figure(trainings: Sequence[tuple[str, Training]], caption: str) -> Figure:
    """Loss, gradient norm and, where routers were watched, how much they still changed.

    Args:
        trainings: Labelled; each has rows.
        caption: Stands below.
    """
    routers = [(label, _changes(training)) for label, training in trainings]
    columns = 3 if any(len(changes) > 1 for _, changes in routers) else 2
    drawn, axes = plots.figure(1, columns, (3.2 * columns, 2.9))
    for index, (label, training) in enumerate(trainings):
        shown: dict[str, Any] = {
            "color": _colour(training, [run for _, run in trainings[:index]]),
            "label": label,
            "linestyle": ("-", "--", "-.", ":")[index % 4],
            "linewidth": 1.6,
        }
        for axis, key in zip(axes[0], ("loss", "grad_norm"), strict=False):
            rows = [(row["step"], row[key]) for row in training.rows if row.get(key) is not None]
            if rows:
                axis.plot(*zip(*rows, strict=True), **shown)
        changes = routers[index][1]
        if columns == 3 and changes:
            axes[0][2].plot(*zip(*changes, strict=True), marker=plots.MARKERS[index % 7], **shown)
    for axis, title in zip(
        axes[0], ("loss", "gradient norm", "fate changed, % of vision tokens"), strict=False
    ):
        axis.set(title=title, xlabel="step")
        axis.set_ylim(bottom=0)
    axes[0][0].legend()
    return finish(drawn, "training", caption)


@plots.look()
def retention_figure(ratios: Sequence[float | None], caption: str) -> Figure:
    """Share of the vision tokens that each layer keeps."""
    drawn, axes = plots.figure(1, 1, (6.4, 2.1))
    axis = axes[0][0]
    colours = [plots.DENSE if ratio is None else plots.PMOD for ratio in ratios]
    axis.bar(range(len(ratios)), [100 if r is None else 100 * r for r in ratios], 0.72, color=colours)
    axis.set(xlabel="decoder layer", ylabel="vision tokens kept, %", ylim=(0, 105), yticks=[0, 50, 100])
    axis.set_xlim(-0.7, len(ratios) - 0.3)
    axis.set_xticks(range(0, len(ratios), max(1, len(ratios) // 16)))
    return finish(drawn, "retention", caption)


def finish(drawn: Any, name: str, caption: str) -> Figure:
    """A figure in both forms."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=160, metadata={"Software": "pmod report"})
    return Figure(name, caption, buffer.getvalue(), plots.inline_svg(drawn, f"{name}: {caption}"))


def _same_place(first: Point, second: Point) -> bool:
    return abs(first.flops / second.flops - 1) < 0.02 and abs(first.accuracy - second.accuracy) < 0.5


def _changes(training: Training) -> list[tuple[int, float]]:
    """Step, and percent of the vision tokens whose fate differs from the look before, mean over layers."""
    found = []
    for row in training.rows:
        shares = [layer.get("changed") for layer in row.get("routers") or ()]
        known = [share for share in shares if share is not None]  # the first look has none before it
        if known:
            found.append((row["step"], 100 * sum(known) / len(known)))
    return found


def _routes(training: Training) -> bool:
    """Whether a p-MoD model was trained."""
    parts = ((training.summary or {}).get("result") or {}).get("parts") or []
    return any(part["part"] == "routers" for part in parts) or any("routers" in row for row in training.rows)


def _colour(training: Training, before: Sequence[Training]) -> str:
    """The dense and the p-MoD model's colours for the first of each, then others."""
    kind = _routes(training)
    alike = sum(_routes(run) == kind for run in before)
    if not alike:
        return plots.PMOD if kind else plots.DENSE
    return plots.SERIES[1 + (len(before) - 1) % (len(plots.SERIES) - 2)]
