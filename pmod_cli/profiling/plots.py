"""One picture of a profile, and curves of sweeps; readable at the width of a paper's page."""

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

    Args:
        result: The profile.
        path: Where to write; the suffix says the format (png, pdf, svg).

    Raises:
        MissingExtraError: matplotlib is not installed.
        PmodError: The format is not known, or the folder does not exist.
    """
    figure, axes = plots.figure(2, 2, (9, 6))
    roles = [role for role in ("dense", "pmod") if role in result.variants]
    largest = result.variants[roles[0]]
    flops_unit, flops_factor = prefix(max(FLOPS_PER_MAC * layer.macs for layer in largest.prefill.layers))
    bytes_unit, bytes_factor = prefix(max(largest.kv_prefill))
    for role in roles:
        profile = result.variants[role]
        layers = profile.prefill.layers
        curves = (
            [100 * layer.tokens / profile.work.prompt_tokens for layer in layers],
            [FLOPS_PER_MAC * layer.macs / flops_factor for layer in layers],
            [count / bytes_factor for count in profile.kv_prefill],
        )
        # Dense below and wider, so that both are seen where they agree.
        look = {
            "color": plots.COLOURS[role],
            "label": plots.NAMES[role],
            "linewidth": 3.2 if role == "dense" else 1.6,
        }
        for axis, curve in zip(axes.flat, curves, strict=False):
            axis.step(range(len(layers)), curve, where="mid", **look)
    titles = (
        ("Tokens processed", "% of the prompt"),
        ("Prefill FLOPs", f"{flops_unit}FLOPs (2 per MAC)"),
        ("KV cache after prefill", f"{bytes_unit}B"),
    )
    for axis, (title, unit) in zip(axes.flat, titles, strict=False):
        axis.set(title=title, ylabel=unit, xlabel="decoder layer")
        axis.set_ylim(bottom=0)
    axes[0][0].legend()
    _draw_phases(axes[1][1], result, roles)
    work = result.work
    figure.suptitle(
        f"{result.model}: {work.vision_tokens} vision + {work.text_tokens} text tokens, batch {work.batch}"
    )
    plots.save(figure, path)


@plots.look()
def plot_sweep(rows: list[dict[str, Any]], knob: str, path: Path, title: str = "") -> None:
    """Draw the ratios of p-MoD to dense over what was swept.

    Args:
        rows: What `pmod_cli.profiling.sweep.sweep` gave.
        knob: ``ratio``, ``tokens`` or ``batch``.
        path: Where to write.
        title: The title of the picture.

    Raises:
        MissingExtraError: matplotlib is not installed.
        PmodError: The format is not known, or the folder does not exist.
    """
    figure, [[axis]] = plots.figure(1, 1, (5.5, 3.8))
    labels = {
        "prefill_flops": "prefill FLOPs",
        "kv_prefill": "KV cache",
        "decode_step_traffic": "decode traffic",
        "prefill_seconds": "prefill time",
        "decode_seconds": "decode time",
        "end_to_end_seconds": "end to end",
    }
    values = [row[knob] for row in rows]
    for (key, label), colour, marker in zip(labels.items(), plots.SERIES, plots.MARKERS, strict=False):
        if all(key in row for row in rows):
            axis.plot(values, [row[key] for row in rows], marker=marker, color=colour, label=label)
    axis.set(xlabel={"ratio": "ratio of the MoD layers", "tokens": "text tokens"}.get(knob, knob))
    axis.set(ylabel="p-MoD / dense", title=title)
    axis.axhline(1, color=plots.FAINT, linewidth=0.8)
    axis.set_ylim(bottom=0)
    if knob != "ratio":
        axis.set_xscale("log", base=2)
        axis.set_xticks(values, [str(value) for value in values])
    axis.legend()
    plots.save(figure, path)


def _draw_phases(axis: Any, result: ProfileResult, roles: Sequence[str]) -> None:
    """Bars of the phases: measured time, or else FLOPs."""
    measured = result.latency
    unit, factor = prefix(FLOPS_PER_MAC * max(result.variants[role].generation_macs for role in roles))
    for offset, role in enumerate(roles):
        spread = None
        if measured:
            timings = measured.models[role].seconds
            names = [phase.replace("_", " ") for phase in timings]
            heights = [1e3 * timing.median for timing in timings.values()]
            spread = [
                [1e3 * (timing.median - min(timing.seconds)) for timing in timings.values()],
                [1e3 * (max(timing.seconds) - timing.median) for timing in timings.values()],
            ]
        else:
            profile = result.variants[role]
            names = ["prefill", "decode", "end to end"]
            prefill, total = profile.prefill.macs, profile.generation_macs
            heights = [FLOPS_PER_MAC * count / factor for count in (prefill, total - prefill, total)]
        middles = [index + 0.4 * (offset - (len(roles) - 1) / 2) for index in range(len(names))]
        axis.bar(middles, heights, 0.38, yerr=spread, capsize=2, color=plots.COLOURS[role])
        axis.set_xticks(range(len(names)), names)
    if measured:
        axis.set(title=f"Time on {measured.device.split(' (')[0]}", ylabel="ms")
    else:
        axis.set(title=f"FLOPs with {result.work.new_tokens} new tokens", ylabel=f"{unit}FLOPs (2 per MAC)")
