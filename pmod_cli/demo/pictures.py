"""The demo's own picture: retention and FLOPs by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pmod_cli.output import plots as style


@style.look()
def draw_layers(path: Path, ratios: Sequence[float | None], flops: dict[str, list[float]]) -> None:
    """Retention ratio by layer above FLOPs by layer, dense beside p-MoD.

    Args:
        path: The PNG to write.
        ratios: One a layer, None for a dense layer.
        flops: FLOPs of one sample's prefill by layer, for ``dense`` and ``pmod``.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure, axes = style.figure(2, 1, (6, 4.6), sharex=True)
    above, below = axes[:, 0]
    layers = range(len(ratios))
    colours = [style.DENSE if ratio is None else style.PMOD for ratio in ratios]
    above.bar(layers, [100 if ratio is None else 100 * ratio for ratio in ratios], 0.72, color=colours)
    above.set(ylabel="vision tokens kept, %", ylim=(0, 105))
    width = 0.38
    for offset, role in ((-width / 2, "dense"), (width / 2, "pmod")):
        heights = [value / 1e6 for value in flops[role]]
        places = [layer + offset for layer in layers]
        below.bar(places, heights, width, color=style.COLOURS[role], label=style.NAMES[role])
    below.set(xlabel="decoder layer", ylabel="prefill MFLOPs a sample", xticks=layers)
    below.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    style.save(figure, path, title="Retention and prefill FLOPs by layer")
