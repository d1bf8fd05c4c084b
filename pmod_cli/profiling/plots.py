"""One picture of a profile, readable at the width of a paper's page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pmod_cli import plots
from pmod_cli.output.paths import public_name
from pmod_cli.output.units import prefix
from pmod_cli.profiling.profile import sides


@plots.look()
def plot_profile(result: dict[str, Any], path: Path, *, force: bool = True) -> None:
    """Draw retention, FLOPs and KV cache by layer, and time by phase (FLOPs by phase if nothing was measured).

    Raises:
        MissingExtraError: matplotlib is not installed.
        PmodError: The path's suffix is not a known format, or the folder does not exist.
    """
    drawn, axes = plots.figure(2, 2, (9, 6))
    work, models = result["workload"], sides(result)
    largest = next(iter(models.values()))
    flops_unit, flops_factor = prefix(max(layer["flops"] for layer in largest["prefill"]["layers"]))
    bytes_unit, bytes_factor = prefix(max(largest["kv_cache"]["prefill_layers"]))
    for role, side in models.items():
        layers, tokens = side["prefill"]["layers"], side["vision_tokens"] + work["text_tokens"]
        cache = [count / bytes_factor for count in side["kv_cache"]["prefill_layers"]]
        panels = (
            ("Tokens processed", "% of the prompt", [100 * layer["tokens"] / tokens for layer in layers]),
            ("Prefill FLOPs", f"{flops_unit}FLOPs", [layer["flops"] / flops_factor for layer in layers]),
            ("KV cache after prefill", f"{bytes_unit}B", cache),
        )
        for axis, (title, unit, curve) in zip(axes.flat, panels, strict=False):
            # Dense below and wider, so that both are seen where they agree.
            width = 3.2 if role == "dense" else 1.6
            look = {"color": plots.COLOURS[role], "label": plots.NAMES[role], "linewidth": width}
            axis.step(range(len(layers)), curve, where="mid", **look)
            axis.set(title=title, ylabel=unit, xlabel="decoder layer")
            axis.set_ylim(bottom=0)
    axes[0][0].legend()
    _draw_phases(axes[1][1], result, models)
    drawn.suptitle(
        f"{public_name(result['model'])}: {work['vision_tokens']} vision + {work['text_tokens']} text tokens, "
        f"batch {work['batch']}"
    )
    plots.save(drawn, Path(path), force=force)


def _draw_phases(axis: Any, result: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]]) -> None:
    """Bars of the phases: measured time with its range, or else FLOPs."""
    measured = result["latency"]
    unit, factor = prefix(max(side["generation"]["flops"] for side in models.values()))
    for offset, (role, side) in enumerate(models.items()):
        spread = None
        if measured:
            timings = side["latency"]["seconds"]
            names = [phase.replace("_", " ") for phase in timings]
            heights = [1e3 * timing["median"] for timing in timings.values()]
            below = [1e3 * (timing["median"] - timing["min"]) for timing in timings.values()]
            spread = [below, [1e3 * (timing["max"] - timing["median"]) for timing in timings.values()]]
        else:
            names = ["prefill", "decode", "end to end"]
            prefill, total = side["prefill"]["flops"], side["generation"]["flops"]
            heights = [count / factor for count in (prefill, total - prefill, total)]
        middles = [index + 0.4 * (offset - (len(models) - 1) / 2) for index in range(len(names))]
        axis.bar(middles, heights, 0.38, yerr=spread, capsize=2, color=plots.COLOURS[role])
        axis.set_xticks(range(len(names)), names)
    if measured:
        axis.set(title=f"Time on {measured['device'].split(' (')[0]}", ylabel="ms")
    else:
        new = result["workload"]["new_tokens"]
        axis.set(title=f"FLOPs with {new} new tokens", ylabel=f"{unit}FLOPs")
