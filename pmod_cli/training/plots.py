"""One picture of a run: the loss, and what the routers did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pmod_cli.output import plots as style

_STATISTICS = (
    ("mean_weight", "mean router weight"),
    ("changed", "vision tokens whose fate changed, share"),
    ("entropy", "entropy over the image's positions"),
)


@style.look()
def plot_run(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw loss and learning rate by step and, of a p-MoD model, each router's statistics.

    Args:
        rows: Of ``metrics.jsonl``.
        path: Where to write; the suffix says the format.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    looks = [row for row in rows if "routers" in row]
    count = 1 + len(_STATISTICS) if looks else 1
    drawn, axes = style.figure(count, 1, (7, 2.4 * count))
    logged = [row for row in rows if row.get("loss") is not None]
    _draw_loss(axes[0][0], logged, style.PMOD if looks else style.DENSE)
    for index, (name, title) in enumerate(_STATISTICS[: count - 1], 1):
        _draw_routers(drawn, axes[index][0], looks, name, title)
    style.save(drawn, path, title="training")


def _draw_loss(axis: Any, rows: list[dict[str, Any]], colour: str) -> None:
    steps = [row["step"] for row in rows]
    axis.plot(steps, [row["loss"] for row in rows], color=colour)
    axis.set(title="loss (line) and learning rate (dashed)", xlabel="step", ylabel="loss")
    axis.set_ylim(bottom=0)
    rates = axis.twinx()
    shown: dict[str, Any] = {"color": style.SERIES[1], "linewidth": 1, "linestyle": "--"}
    rates.plot(steps, [row.get("learning_rate") for row in rows], **shown)
    rates.set_ylabel("learning rate")
    rates.set_ylim(bottom=0)


def _draw_routers(drawn: Any, axis: Any, looks: list[dict[str, Any]], name: str, title: str) -> None:
    """A colour for each layer and look: rows are layers, columns are looks."""
    layers = [row["layer"] for row in looks[0]["routers"]]
    nothing = float("nan")
    values = [
        [nothing if look["routers"][place][name] is None else look["routers"][place][name] for look in looks]
        for place in range(len(layers))
    ]
    image = axis.imshow(values, aspect="auto", origin="lower", cmap=style.HEAT, interpolation="nearest")
    axis.set(title=title, xlabel="step", ylabel="decoder layer")
    axis.grid(False)
    every = max(1, len(looks) // 8)
    axis.set_xticks(range(0, len(looks), every), [look["step"] for look in looks[::every]])
    every = max(1, len(layers) // 8)
    axis.set_yticks(range(0, len(layers), every), layers[::every])
    drawn.colorbar(image, ax=axis)
