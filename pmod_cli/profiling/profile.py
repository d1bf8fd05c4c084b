"""Puts a profile together: count the two models, measure them if asked, and divide p-MoD by dense."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pmod_cli.extras import installed, require
from pmod_cli.output.errors import PmodError
from pmod_cli.output.versions import versions
from pmod_cli.profiling import closed_form
from pmod_cli.profiling.closed_form import LAYER_PARTS, PAPER, PhaseCount
from pmod_cli.profiling.geometry import Geometry
from pmod_cli.profiling.options import ProfileOptions
from pmod_cli.profiling.prompt import Workload
from pmod_cli.profiling.subject import Subject, Variant
from pmod_cli.published import COSTS, Published

FLOPS_PER_MAC = 2

_RATIOS = {
    "prefill_flops": "prefill.flops",
    "decode_step_flops": "decode_step.flops",
    "generation_flops": "generation.flops",
    "kv_prefill": "kv_cache.prefill_bytes",
    "kv_final": "kv_cache.final_bytes",
    "prefill_traffic": "least_traffic_bytes.prefill",
    "decode_step_traffic": "least_traffic_bytes.decode_step",
    "parameters": "parameters.total",
    "first_prefill_seconds": "latency.seconds.first_prefill.median",
    "prefill_seconds": "latency.seconds.prefill.median",
    "decode_seconds": "latency.seconds.decode.median",
    "end_to_end_seconds": "latency.seconds.end_to_end.median",
    "prefill_operators": "latency.operators.prefill",
    "decode_step_operators": "latency.operators.decode_step",
}
"""What is compared, and where it is in a model's figures (see `sides`)."""


def profile(
    subject: Subject, options: ProfileOptions, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Count a model and its baseline, for which only configs are read; measure them if asked.

    Args:
        subject: What `find_subject` found.
        options: The prompt, how to count, whether and where to measure.
        progress: Called with a short text at each step.

    Returns:
        What ``pmod profile --json`` prints (see ``docs/json.md``).

    Raises:
        MissingExtraError: fvcore was asked for by name and is not installed.
        BrokenPackageError: fvcore is installed and cannot be imported.
        PmodError: A prompt that the model cannot take, or see `pmod_cli.profiling.latency.measure`.
    """
    counter = _counter(options)
    works = {role: options.workload(variant.geometry) for role, variant in subject.variants.items()}
    result: dict[str, Any] = {"pmod": None, "dense": None}
    checks: dict[str, bool] = {}
    for role, variant in subject.variants.items():
        if progress:
            progress(f"counting the {'p-MoD' if role == 'pmod' else 'dense'} model ({counter})")
        what = variant.geometry, variant.mod, works[role], options.convention
        phases = closed_form.prefill(*what), closed_form.decode_step(*what)
        if counter == "fvcore":
            from pmod_cli.profiling import fvcore_counter

            traced = fvcore_counter.trace(variant, works[role])
            checks["formula"] = checks.get("formula", True) and traced == phases
            phases = traced
        result[role] = _figures(variant, works[role], phases, options.convention)
    if options.latency:
        from pmod_cli.profiling.latency import measure

        result["latency"] = measure(subject, works, options, progress)
    geometry, work = subject.main.geometry, next(iter(works.values()))
    published = _published(geometry) if options.convention == PAPER else None
    result = {
        "model": subject.name,
        "workload": {
            "image_size": list(reversed(work.image_size)) if work.image_size else None,
            "vision_tokens": work.vision_tokens,
            "text_tokens": work.text_tokens,
            "new_tokens": work.new_tokens,
            "batch": work.batch,
            "dtype": work.dtype,
            "logits": "all" if work.all_logits else "last",
        },
        "convention": options.convention,
        "counted_by": counter,
        "checks": checks,
        "published": vars(published) if published else None,
        "latency": None,
        "versions": versions("pmod-cli", "torch", "transformers", "fvcore"),
        **result,
    }
    both = sides(result)
    ratios = {}
    if len(both) == 2:
        for key, path in _RATIOS.items():
            pmod, dense = (figure(both[role], path) for role in ("pmod", "dense"))
            if dense is not None:
                ratios[key] = pmod / dense
    return result | {"ratios": ratios}


def sides(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The figures of each model by ``dense`` and ``pmod``, with its own ``latency`` and ``published``."""
    latency, published = (result.get("latency") or {}).get("models", {}), result.get("published") or {}
    return {
        role: result[role] | {"latency": latency.get(role), "published": published.get(f"{role}_tflops")}
        for role in ("dense", "pmod")
        if result.get(role)
    }


def figure(side: Any, path: str) -> Any:
    """A figure of a model by its path, e.g. ``kv_cache.prefill_bytes``; None if there is none."""
    for key in path.split("."):
        side = (side or {}).get(key)
    return side


def _counter(options: ProfileOptions) -> str:
    """``fvcore`` or ``formula``."""
    if options.convention == PAPER:
        if options.counter == "fvcore":
            raise PmodError("the paper convention is counted by formula only")
        return "formula"
    if options.counter == "formula" or (options.counter == "auto" and not installed("fvcore")):
        return "formula"
    require("fvcore")
    return "fvcore"


def _figures(
    variant: Variant, work: Workload, phases: tuple[PhaseCount, PhaseCount], convention: str
) -> dict[str, Any]:
    """A model's part of the result."""
    what = variant.geometry, variant.mod, work
    parameters = closed_form.parameters(variant.geometry, variant.mod)
    kept = closed_form.layer_tokens(*what)
    vision = None
    # Which tokens go, text or vision, is the router's choice if they compete.
    if work.vision_tokens and not (variant.mod and variant.mod.target_tokens == "all"):
        vision = (sum(kept) / len(kept) - work.text_tokens) / work.vision_tokens
    return {
        "name": variant.name,
        "model_type": variant.model_type,
        "retention_ratios": variant.mod.retention_ratios if variant.mod else None,
        "vision_tokens": work.vision_tokens,
        "crops": work.image.crops if work.image else 0,
        "parameters": {"total": sum(parameters.values()), **parameters},
        "prefill": phase_dict(phases[0]),
        "decode_step": phase_dict(phases[1]),
        "generation": _work(closed_form.generation_macs(*what, convention)),
        "kv_cache": closed_form.kv_cache_dict(
            closed_form.kv_bytes(*what), closed_form.kv_bytes(*what, decoded=work.new_tokens - 1)
        ),
        "retention": {"vision": vision, "all": sum(kept) / len(kept) / work.prompt_tokens},
        "least_traffic_bytes": closed_form.least_traffic(*what),
    }


def _work(macs: int) -> dict[str, int]:
    return {"macs": macs, "flops": FLOPS_PER_MAC * macs}


def phase_dict(count: PhaseCount) -> dict[str, Any]:
    """MACs and FLOPs of a prefill or decode step, by part and by layer."""
    return {
        **_work(count.macs),
        "parts": {part: _work(macs) for part, macs in count.parts.items()},
        "layers": [
            {"tokens": layer.tokens, **_work(layer.macs)}
            | {f"{part}_macs": getattr(layer, part) for part in LAYER_PARTS}
            for layer in count.layers
        ],
    }


def _published(geometry: Geometry) -> Published | None:
    """What the paper says about a model of this geometry; None if it says nothing."""
    decoder = geometry.decoder
    shape = (decoder.hidden, decoder.layers, decoder.intermediate, geometry.original_vocab)
    return COSTS.get(geometry.model_type) if shape == (4096, 32, 11008, 32000) else None  # Vicuna 7B
