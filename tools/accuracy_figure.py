"""Draws the README's picture of accuracy against FLOPs, from the tables that the p-MoD paper publishes.

Nothing in it was measured with this package. Run::

    python tools/accuracy_figure.py docs/images/accuracy-flops.png
"""

from __future__ import annotations

import sys
from pathlib import Path

from pmod_cli import plots
from pmod_cli.evaluation.paper import average
from pmod_cli.published import COSTS, SCORES

MODELS = {"llava": "LLaVA-1.5-7B", "llava_next": "LLaVA-NeXT-7B"}


@plots.look()
def main(path: str) -> None:
    """Draw one pair of points per model, dense and p-MoD, and write the picture to `path`."""
    figure, axes = plots.figure(1, 1, (6.4, 3.0))
    axis = axes[0, 0]
    for number, (family, name) in enumerate(MODELS.items()):
        published = COSTS[family]
        scores = [average(SCORES[family][role]) or 0.0 for role in ("baseline", "model")]
        flops = [published.dense_tflops, published.pmod_tflops]
        axis.plot(flops, scores, color=plots.FAINT, linewidth=1, linestyle=":", zorder=1)
        for kind, x, y in zip(("dense", "pmod"), flops, scores, strict=True):
            marker = {"dense": "s", "pmod": "o"}[kind]
            label = plots.NAMES[kind] if number == 0 else None
            axis.plot(x, y, marker, markersize=8, color=plots.COLOURS[kind], label=label)
            axis.annotate(f"{y:.1f}", (x, y), (0, 9), textcoords="offset points", ha="center", fontsize=8.5)
        axis.annotate(
            f"{name}: {published.pmod_tflops / published.dense_tflops:.1%} of the FLOPs".replace("%", " %"),
            (flops[1], min(scores)),
            (-5, -19),
            textcoords="offset points",
            fontsize=8.5,
            backgroundcolor="white",
        )
    axis.set(xlim=(0, 44), ylim=(45, 70))
    axis.set(xlabel="TFLOPs of a prefill, as the paper counts them", ylabel="mean of 14 benchmarks")
    axis.legend(loc="lower right")
    figure.suptitle("Accuracy against FLOPs: the paper's own figures (arXiv 2412.04449)")
    plots.save(figure, Path(path), title="Accuracy against FLOPs, as published", dpi=150)


if __name__ == "__main__":
    main(sys.argv[1])
