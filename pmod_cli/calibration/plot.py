"""The picture of a calibration: agreement with the dense model against FLOPs."""

from __future__ import annotations

import io
from typing import Any

from pmod_cli import plots


@plots.look()
def draw(result: dict[str, Any]) -> bytes:
    """A PNG of the curve in a result of `calibrate`.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    drawn, [[axis]] = plots.figure(1, 1, (6.4, 4.2))
    names = list(dict.fromkeys(point["name"] for point in result["curve"]))
    for name, colour, marker in zip(names, plots.SERIES, plots.MARKERS, strict=False):
        points = sorted((p for p in result["curve"] if p["name"] == name), key=lambda p: p["flops"])
        shares = [100 * point["flops"] for point in points]
        means = [100 * point["agreement"]["mean"] for point in points]
        bars = [
            [max(mean - 100 * p["agreement"]["low"], 0) for mean, p in zip(means, points, strict=True)],
            [max(100 * p["agreement"]["high"] - mean, 0) for mean, p in zip(means, points, strict=True)],
        ]
        axis.errorbar(shares, means, yerr=bars, capsize=2, color=colour, marker=marker, label=name)
    axis.set(xlabel="prefill FLOPs, % of dense", ylabel="greedy answers as dense, %", ylim=(None, 102))
    axis.legend()
    judged = result["questions"]["judge"]
    drawn.suptitle(f"{judged} questions of pictures that nothing was chosen on, 95 % intervals")
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=160, metadata={"Software": "pmod", "Title": "pmod calibrate"})
    return buffer.getvalue()
