"""One picture of a run: the loss, and what the routers did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pmod_cli.errors import MissingExtraError

# Blue and orange of the Okabe-Ito palette: told apart by everyone, and in grey.
_LOSS, _RATE = "#0072B2", "#E69F00"
_STATISTICS = (
    ("mean_weight", "mean router weight"),
    ("changed", "share of vision tokens whose fate changed"),
    ("entropy", "entropy over the image's positions"),
)


def plot_run(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw loss and learning rate by step and, of a p-MoD model, each router's statistics.

    Args:
        rows: Of ``metrics.jsonl``.
        path: Where to write; the suffix says the format.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "plot") from None
    looks = [row for row in rows if "routers" in row]
    count = 1 + len(_STATISTICS) if looks else 1
    figure: Any = Figure(figsize=(8, 3 * count), layout="constrained")
    axes = figure.subplots(count, 1, squeeze=False)[:, 0]
    _draw_loss(axes[0], [row for row in rows if row.get("loss") is not None])
    for axis, (name, title) in zip(axes[1:], _STATISTICS, strict=False):
        _draw_routers(figure, axis, looks, name, title)
    figure.savefig(path, dpi=120)


def _draw_loss(axis: Any, rows: list[dict[str, Any]]) -> None:
    steps = [row["step"] for row in rows]
    axis.plot(steps, [row["loss"] for row in rows], color=_LOSS, linewidth=1.4)
    axis.set(title="loss", xlabel="step", ylabel="loss")
    axis.set_ylim(bottom=0)
    rates = axis.twinx()
    rates.plot(steps, [row.get("learning_rate") for row in rows], color=_RATE, linewidth=1, linestyle="--")
    rates.set_ylabel("learning rate")
    rates.set_ylim(bottom=0)


def _draw_routers(figure: Any, axis: Any, looks: list[dict[str, Any]], name: str, title: str) -> None:
    """A colour for each layer and look: rows are layers, columns are looks."""
    layers = [row["layer"] for row in looks[0]["routers"]]
    values = [
        [
            float("nan") if look["routers"][place][name] is None else look["routers"][place][name]
            for look in looks
        ]
        for place in range(len(layers))
    ]
    image = axis.imshow(values, aspect="auto", origin="lower", cmap="viridis", interpolation="nearest")
    axis.set(title=title, xlabel="step", ylabel="layer")
    every = max(1, len(looks) // 8)
    axis.set_xticks(range(0, len(looks), every), [look["step"] for look in looks[::every]])
    every = max(1, len(layers) // 8)
    axis.set_yticks(range(0, len(layers), every), layers[::every])
    figure.colorbar(image, ax=axis)
