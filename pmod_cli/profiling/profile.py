"""Puts a profile together: count the two models, and measure them if asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pmod_cli.extras import installed, require
from pmod_cli.output.errors import PmodError
from pmod_cli.output.versions import versions
from pmod_cli.profiling import closed_form
from pmod_cli.profiling.closed_form import PAPER
from pmod_cli.profiling.geometry import Geometry
from pmod_cli.profiling.options import ProfileOptions
from pmod_cli.profiling.prompt import Workload
from pmod_cli.profiling.result import ProfileResult, VariantProfile
from pmod_cli.profiling.subject import Subject, Variant
from pmod_cli.published import COSTS, Published


def profile(
    subject: Subject, options: ProfileOptions, progress: Callable[[str], None] | None = None
) -> ProfileResult:
    """Count a model and its baseline, for which only configs are read; measure them if asked.

    Args:
        subject: What `find_subject` found.
        options: The prompt, how to count, whether and where to measure.
        progress: Called with a short text at each step.

    Raises:
        MissingExtraError: fvcore was asked for by name and is not installed.
        BrokenPackageError: fvcore is installed and cannot be imported.
        PmodError: A prompt that the model cannot take, or see `pmod_cli.profiling.latency.measure`.
    """
    counter = _counter(options)
    variants: dict[str, VariantProfile] = {}
    checks: dict[str, bool] = {}
    for role, variant in subject.variants.items():
        if progress:
            progress(f"counting the {'p-MoD' if role == 'pmod' else 'dense'} model ({counter})")
        work = options.workload(variant.geometry)
        found = _by_formula(variant, work, options.convention)
        if counter == "fvcore":
            from pmod_cli.profiling import fvcore_counter

            prefill, step = fvcore_counter.trace(variant, work)
            agrees = (prefill, step) == (found.prefill, found.decode_step)
            checks["formula"] = checks.get("formula", True) and agrees
            found = replace(found, prefill=prefill, decode_step=step)
        variants[role] = found
    latency = None
    if options.latency:
        from pmod_cli.profiling.latency import measure

        works = {role: variant.work for role, variant in variants.items()}
        latency = measure(subject, works, options.device, options.repeats, progress)
    geometry = subject.main.geometry
    return ProfileResult(
        model=subject.name,
        variants=variants,
        work=options.workload(geometry),
        convention=options.convention,
        counted_by=counter,
        checks=checks,
        published=_published(geometry) if options.convention == PAPER else None,
        latency=latency,
        versions=versions("pmod-cli", "torch", "transformers", "fvcore"),
    )


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


def _by_formula(variant: Variant, work: Workload, convention: str) -> VariantProfile:
    what = variant.geometry, variant.mod, work
    kept = closed_form.layer_tokens(*what)
    vision = None
    # Which tokens go, text or vision, is the router's choice if they compete.
    if work.vision_tokens and not (variant.mod and variant.mod.target_tokens == "all"):
        vision = (sum(kept) / len(kept) - work.text_tokens) / work.vision_tokens
    return VariantProfile(
        name=variant.name,
        model_type=variant.model_type,
        retention_ratios=variant.mod.retention_ratios if variant.mod else None,
        work=work,
        parameters=closed_form.parameters(variant.geometry, variant.mod),
        prefill=closed_form.prefill(*what, convention),
        decode_step=closed_form.decode_step(*what, convention),
        generation_macs=closed_form.generation_macs(*what, convention),
        kv_prefill=closed_form.kv_bytes(*what),
        kv_final=closed_form.kv_bytes(*what, decoded=work.new_tokens - 1),
        vision_retention=vision,
        token_retention=sum(kept) / len(kept) / work.prompt_tokens,
        traffic=closed_form.least_traffic(*what),
    )


def _published(geometry: Geometry) -> Published | None:
    """What the paper says about a model of this geometry; None if it says nothing."""
    decoder = geometry.decoder
    shape = (decoder.hidden, decoder.layers, decoder.intermediate, geometry.original_vocab)
    return COSTS.get(geometry.model_type) if shape == (4096, 32, 11008, 32000) else None  # Vicuna 7B
