"""Says in words what the figures of a profile mean: how they were counted, and where a saving does not show."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pmod_cli.output.units import size
from pmod_cli.profiling.result import ProfileResult

if TYPE_CHECKING:
    from pmod_cli.profiling.latency import Latency

# A time ratio this much above the FLOPs ratio is worth a word.
_NOTICEABLE = 0.05
# Bytes below which a decode step is not bound by memory on any machine of today.
_SMALL = 10**8


def notes(result: ProfileResult) -> list[str]:
    """Sentences to print under the table."""
    lines = [*_counting(result), *_published(result)]
    if result.latency is not None:
        lines += _timing(result, result.latency)
    return lines


def _counting(result: ProfileResult) -> list[str]:
    formula = result.counted_by == "formula"
    how = "by formula (docs/profile.md)" if formula else f"by {result.counted_by} on the meta device"
    lines = [f"MACs {how}; one MAC is one multiply-add, two FLOPs."]
    if "formula" in result.checks:
        lines.append(
            "The closed form agrees in every part and layer."
            if result.checks["formula"]
            else "WARNING: the closed form does NOT agree; please report this model's config."
        )
    return lines


def _published(result: ProfileResult) -> list[str]:
    if result.convention != "paper":
        return []
    lines = [
        "Paper convention: 30 text tokens by default, no attention score and value products, one crop through the "
        "whole vision tower, LM head on all positions over the original vocabulary."
    ]
    if result.published is None:
        lines.append("The paper publishes no TFLOPs for this model.")
    return lines


def _timing(result: ProfileResult, latency: Latency) -> list[str]:
    lines = []
    if latency.random_weights:
        lines.append("Weights are random (only a config was given); times do not depend on their values.")
    lines.append(
        f"Dense and p-MoD alternate: medians of {latency.repeats} runs, fastest and slowest in brackets; "
        f"CPU threads: {latency.threads}; the process used at most {size(latency.process_peak)} of memory."
    )
    overhead = latency.bound_overhead
    if overhead is not None and overhead < 0:
        lines.append(
            "p-MoD's prefill came out below its own bound: the runs scatter by more than its overhead. Use more "
            "--repeats on a quiet machine."
        )
    elif overhead is not None:
        lines.append(
            f"p-MoD's prefill takes {overhead:+.0%} over the bound in which each layer runs on its kept tokens and "
            "nothing else is done; routing, gathering and scattering make the difference."
        )
        if latency.ratios:
            lines += _prefill(result.ratios, overhead)
    if "decode_seconds" in latency.ratios:
        lines.append(_decode(result))
    return lines


def _prefill(ratios: dict[str, float], overhead: float) -> list[str]:
    """Why prefill time falls by less than its FLOPs, where it does."""
    time, flops = ratios["prefill_seconds"], ratios["prefill_flops"]
    if time <= flops + _NOTICEABLE:
        return []
    bound = time / (1 + overhead)
    why = ""
    if bound > flops + _NOTICEABLE:
        why = " (fewer tokens fill the processor less well, and each operation has a fixed cost)"
    return [
        f"Prefill FLOPs fall to {flops:.0%}, time to {time:.0%}: the bound alone takes {bound:.0%} of dense{why}, the "
        "overhead makes up the rest; both weigh less in larger models and longer prompts."
    ]


def _decode(result: ProfileResult) -> str:
    """How far decode time can fall."""
    ratios, dense = result.ratios, result.variants["dense"]
    traffic = dense.traffic["decode_step"]
    return (
        f"Decode time goes to {ratios['decode_seconds']:.0%}: of the {size(traffic)} that a step must read, the KV "
        f"cache is {sum(dense.kv_prefill) / traffic:.1%} and the rest weights, so traffic falls to "
        f"{ratios['decode_step_traffic']:.1%} and no further"
    ) + (
        "; in a model this small most of the time goes into launching operations."
        if traffic < _SMALL
        else "; larger batches and longer prompts save more."
    )
