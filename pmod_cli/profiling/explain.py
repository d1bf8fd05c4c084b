"""Says in words what the figures of a profile mean: how they were counted, and where a saving does not show."""

from __future__ import annotations

from pmod_cli.profiling.result import ProfileResult, VariantProfile

# A time ratio this much above the FLOPs ratio is worth a word.
_NOTICEABLE = 0.05


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
    if latency.bound_overhead is not None:
        lines.append(
            f"p-MoD's prefill takes {latency.bound_overhead:+.0%} over the bound in which layers see their kept "
            "tokens and do nothing else (router, choice, gathering and scattering make the difference)."
        )
    ratios = result.ratios
    dense = result.variants.get("dense")
    if not latency.ratios or dense is None:
        return lines
    if ratios["prefill_seconds"] > ratios["prefill_flops"] + _NOTICEABLE:
        lines.append(
            f"Prefill time falls to {ratios['prefill_seconds']:.0%} and its FLOPs to {ratios['prefill_flops']:.0%}: "
            + _prefill_reason(result, dense)
        )
    if "decode_seconds" in ratios:
        traffic = dense.traffic["decode_step"]
        share = sum(dense.kv_prefill) / traffic
        lines.append(
            f"Decode time goes to {ratios['decode_seconds']:.0%}: a step reads {traffic / 1e9:.3g} GB of weights "
            f"and KV cache, of which the cache is {share:.1%}, so it can fall to "
            f"{ratios['decode_step_traffic']:.1%} at best; larger batches and longer prompts save more."
        )
    return lines


def _prefill_reason(result: ProfileResult, dense: VariantProfile) -> str:
    latency = result.latency
    assert latency is not None
    intensity = 2 * dense.prefill.macs / dense.traffic["prefill"]
    reasons = []
    if latency.bound_overhead is not None and latency.bound_overhead > _NOTICEABLE:
        reasons.append("the p-MoD layers' own overhead, which weighs most in small models and short prompts")
    if intensity < 100:
        reasons.append(
            f"with {intensity:.0f} FLOPs a byte the pass is bound by reading weights, which p-MoD reads as well"
        )
    reasons.append("fewer tokens a layer fill the processor less well")
    return "; ".join(reasons) + "."
