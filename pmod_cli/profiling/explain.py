"""Says in words what the figures of a profile mean: how they were counted, and where a saving does not show."""

from __future__ import annotations

from pmod_cli.profiling.result import ProfileResult

# A time ratio this much above the FLOPs ratio is worth a word.
_NOTICEABLE = 0.05
# Bytes below which a decode step is not bound by memory on any machine of today.
_SMALL = 10**8


def size(count: float) -> str:
    """Bytes in the largest decimal unit that leaves a number above 1."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3f} {unit}"
    return f"{count:.0f} B"


def notes(result: ProfileResult) -> list[str]:
    """Sentences to print under the table."""
    return [*_counting(result), *_published(result), *_timing(result)]


def _counting(result: ProfileResult) -> list[str]:
    lines = []
    if result.counted_by == "formula":
        lines.append("MACs by formula (docs/profile.md); one MAC is one multiply-add, two FLOPs.")
    else:
        lines.append(
            f"MACs by {result.counted_by} on the meta device; one MAC is one multiply-add, two FLOPs."
        )
    for name, agrees in result.checks.items():
        other = "the closed form" if name == "formula" else f"{name}'s own count, against its closed form,"
        lines.append(
            f"{other} agrees in every part and layer."
            if agrees
            else f"WARNING: {other} does NOT agree; please report this model's config."
        )
    return [line[0].upper() + line[1:] for line in lines]


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


def _timing(result: ProfileResult) -> list[str]:
    latency = result.latency
    if latency is None:
        return []
    lines = []
    if latency.random_weights:
        lines.append("Weights are random (only a config was given); times do not depend on their values.")
    lines.append(
        f"Medians of {latency.repeats} runs by turns, fastest and slowest in brackets; CPU threads: {latency.threads}; "
        f"the process held {size(latency.process_peak)} of memory at most."
    )
    ratios, dense = result.ratios, result.variants.get("dense")
    overhead = latency.bound_overhead
    if overhead is not None and overhead < 0:
        lines.append(
            "p-MoD's prefill came out below its own bound: the runs scatter by more than its overhead. More --repeats "
            "on a quiet machine tell more."
        )
        overhead = None
    if overhead is not None:
        lines.append(
            f"p-MoD's prefill takes {overhead:+.0%} over the bound in which each layer runs on its kept tokens and "
            "nothing else is done; the router, the choice, gathering and scattering make the difference."
        )
    if not latency.ratios or dense is None:
        return lines
    if overhead is not None and ratios["prefill_seconds"] > ratios["prefill_flops"] + _NOTICEABLE:
        bound = ratios["prefill_seconds"] / (1 + overhead)
        why = ""
        if bound > ratios["prefill_flops"] + _NOTICEABLE:
            why = " (fewer tokens fill the processor less well, and each operation has a fixed cost)"
        lines.append(
            f"Prefill FLOPs fall to {ratios['prefill_flops']:.0%}, time to {ratios['prefill_seconds']:.0%}: the bound "
            f"alone takes {bound:.0%} of dense{why}, the overhead makes up the rest; both weigh less in larger models "
            "and longer prompts."
        )
    if "decode_seconds" in ratios:
        traffic = dense.traffic["decode_step"]
        lines.append(
            f"Decode time goes to {ratios['decode_seconds']:.0%}: of the {size(traffic)} that a step must read the KV "
            f"cache is {sum(dense.kv_prefill) / traffic:.1%} and the rest weights, so traffic falls to "
            f"{ratios['decode_step_traffic']:.1%} and no further"
            + (
                "; in a model this small most of the time goes into launching operations."
                if traffic < _SMALL
                else "; larger batches and longer prompts save more."
            )
        )
    return lines
