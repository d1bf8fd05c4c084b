"""One picture of a profile, readable at the width of a paper's page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pmod_cli import plots
from pmod_cli.output.units import prefix
from pmod_cli.profiling.result import FLOPS_PER_MAC, ProfileResult


@plots.look()
def plot_profile(result: ProfileResult, path: Path) -> None:
    """Draw retention, FLOPs and KV cache by layer, and time by phase (FLOPs by phase if nothing was measured).

    Raises:
        MissingExtraError: matplotlib is not installed.
        PmodError: The path's suffix is not a known format, or the folder does not exist.
    """
    figure, axes = plots.figure(2, 2, (9, 6))
    sides = {role: result.variants[role] for role in ("dense", "pmod") if role in result.variants}
    largest = next(iter(sides.values()))
    flops_unit, flops_factor = prefix(max(FLOPS_PER_MAC * layer.macs for layer in largest.prefill.layers))
    bytes_unit, bytes_factor = prefix(max(largest.kv_prefill))
    for role, side in sides.items():
        layers = side.prefill.layers
        panels = (
            (
                "Tokens processed",
                "% of the prompt",
                [100 * layer.tokens / side.work.prompt_tokens for layer in layers],
            ),
            (
                "Prefill FLOPs",
                f"{flops_unit}FLOPs (2 per MAC)",
                [FLOPS_PER_MAC * layer.macs / flops_factor for layer in layers],
            ),
            ("KV cache after prefill", f"{bytes_unit}B", [count / bytes_factor for count in side.kv_prefill]),
        )
        for axis, (title, unit, curve) in zip(axes.flat, panels, strict=False):
            # Dense below and wider, so that both are seen where they agree.
            width = 3.2 if role == "dense" else 1.6
            look = {"color": plots.COLOURS[role], "label": plots.NAMES[role], "linewidth": width}
            axis.step(range(len(layers)), curve, where="mid", **look)
            axis.set(title=title, ylabel=unit, xlabel="decoder layer")
            axis.set_ylim(bottom=0)
    axes[0][0].legend()
    _draw_phases(axes[1][1], result, list(sides))
    work = result.work
    figure.suptitle(
        f"{result.model}: {work.vision_tokens} vision + {work.text_tokens} text tokens, batch {work.batch}"
    )
    plots.save(figure, path)


def _draw_phases(axis: Any, result: ProfileResult, roles: Sequence[str]) -> None:
    """Bars of the phases: measured time with its range, or else FLOPs."""
    measured = result.latency
    unit, factor = prefix(FLOPS_PER_MAC * max(result.variants[role].generation_macs for role in roles))
    for offset, role in enumerate(roles):
        spread = None
        if measured:
            timings = measured.models[role].seconds
            names = [phase.replace("_", " ") for phase in timings]
            heights = [1e3 * timing.median for timing in timings.values()]
            ends = [(1e3 * min(timing.seconds), 1e3 * max(timing.seconds)) for timing in timings.values()]
            spread = [[h - low for h, (low, _) in zip(heights, ends, strict=True)]]
            spread.append([high - h for h, (_, high) in zip(heights, ends, strict=True)])
        else:
            names = ["prefill", "decode", "end to end"]
            prefill, total = result.variants[role].prefill.macs, result.variants[role].generation_macs
            heights = [FLOPS_PER_MAC * count / factor for count in (prefill, total - prefill, total)]
        middles = [index + 0.4 * (offset - (len(roles) - 1) / 2) for index in range(len(names))]
        axis.bar(middles, heights, 0.38, yerr=spread, capsize=2, color=plots.COLOURS[role])
        axis.set_xticks(range(len(names)), names)
    if measured:
        axis.set(title=f"Time on {measured.device.split(' (')[0]}", ylabel="ms")
    else:
        axis.set(title=f"FLOPs with {result.work.new_tokens} new tokens", ylabel=f"{unit}FLOPs (2 per MAC)")
