"""One picture of a profile, and curves of sweeps; readable at the width of a paper's page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pmod_cli.output import plots as style
from pmod_cli.profiling.result import FLOPS_PER_MAC, ProfileResult


@style.look()
def plot_profile(result: ProfileResult, path: str | Path) -> None:
    """Draw retention, FLOPs and KV cache by layer, and time by phase (FLOPs by phase if nothing was measured).

    Args:
        result: The profile.
        path: Where to write; the suffix says the format (png, pdf, svg).

    Raises:
        MissingExtraError: matplotlib is not installed.
        PmodError: The format is not known, or the folder does not exist.
    """
    figure, axes = style.figure(2, 2, (9, 6))
    roles: list[str] = [role for role in ("dense", "pmod") if role in result.variants]
    largest = result.variants[roles[0]]
    flops_unit, flops_factor = _unit(max(FLOPS_PER_MAC * layer.macs for layer in largest.prefill.layers))
    bytes_unit, bytes_factor = _unit(max(largest.kv_prefill))
    for role in roles:
        profile = result.variants[role]
        layers = profile.prefill.layers
        curves = (
            [100 * layer.tokens / profile.work.prompt_tokens for layer in layers],
            [FLOPS_PER_MAC * layer.macs / flops_factor for layer in layers],
            [count / bytes_factor for count in profile.kv_prefill],
        )
        for axis, curve in zip(axes.flat, curves, strict=False):
            look: dict[str, Any] = {"color": style.COLOURS[role], "label": style.NAMES[role]}
            # Dense below and wider, so that both are seen where they agree.
            width = 3.2 if role == "dense" else 1.6
            axis.step(range(len(layers)), curve, where="mid", linewidth=width, **look)
    titles = (
        ("Tokens processed", "% of the prompt"),
        ("Prefill FLOPs", f"{flops_unit}FLOPs (2 per MAC)"),
        ("KV cache after prefill", f"{bytes_unit}B"),
    )
    for axis, (title, unit) in zip(axes.flat, titles, strict=False):
        axis.set(title=title, ylabel=unit, xlabel="decoder layer")
        axis.set_ylim(bottom=0)
    axes[0][0].legend()
    _phases(axes[1][1], result, roles)
    work = result.work
    figure.suptitle(
        f"{result.model}: {work.vision_tokens} vision + {work.text_tokens} text tokens, batch {work.batch}"
    )
    style.save(figure, path)


@style.look()
def plot_sweep(rows: list[dict[str, Any]], knob: str, path: str | Path, title: str = "") -> None:
    """Draw the ratios of p-MoD to dense over what was swept.

    Args:
        rows: What `pmod_cli.profiling.sweep.sweep` gave.
        knob: ``ratio``, ``tokens`` or ``batch``.
        path: Where to write.
        title: What stands above.

    Raises:
        MissingExtraError: matplotlib is not installed.
        PmodError: The format is not known, or the folder does not exist.
    """
    figure, [[axis]] = style.figure(1, 1, (5.5, 3.8))
    labels = {
        "prefill_flops": "prefill FLOPs",
        "kv_prefill": "KV cache",
        "decode_step_traffic": "decode traffic",
        "prefill_seconds": "prefill time",
        "decode_seconds": "decode time",
        "end_to_end_seconds": "end to end",
    }
    values = [row[knob] for row in rows]
    for index, (key, label) in enumerate(labels.items()):
        if all(key in row for row in rows):
            axis.plot(
                values,
                [row[key] for row in rows],
                marker=style.MARKERS[index],
                color=style.SERIES[index],
                label=label,
            )
    axis.set(xlabel={"ratio": "ratio of the MoD layers", "tokens": "text tokens"}.get(knob, knob))
    axis.set(ylabel="p-MoD / dense", title=title)
    axis.axhline(1, color=style.FAINT, linewidth=0.8)
    axis.set_ylim(bottom=0)
    if knob != "ratio":
        axis.set_xscale("log", base=2)
        axis.set_xticks(values, [str(value) for value in values])
    axis.legend()
    style.save(figure, path)


def _unit(largest: float) -> tuple[str, float]:
    """SI prefix and factor in which a number is between 1 and 1000."""
    prefixes = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))
    return next((pair for pair in prefixes if largest >= pair[1]), ("", 1.0))


def _phases(axis: Any, result: ProfileResult, roles: list[str]) -> None:
    """Bars of the phases."""
    measured = result.latency
    unit, factor = _unit(FLOPS_PER_MAC * max(result.variants[role].generation_macs for role in roles))
    for offset, role in enumerate(roles):
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
            spread = None
        places = [index + 0.4 * (offset - (len(roles) - 1) / 2) for index in range(len(names))]
        axis.bar(
            places, heights, 0.38, yerr=spread, capsize=2, color=style.COLOURS[role], label=style.NAMES[role]
        )
        axis.set_xticks(range(len(names)), names)
    if measured:
        axis.set(title=f"Time on {measured.device.split(' (')[0]}", ylabel="ms")
    else:
        axis.set(title=f"FLOPs with {result.work.new_tokens} new tokens", ylabel=f"{unit}FLOPs (2 per MAC)")
