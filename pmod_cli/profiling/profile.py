"""Puts a profile together: count the two models, and measure them if asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pmod_cli.extras import installed, require
from pmod_cli.output.errors import PmodError
from pmod_cli.output.versions import versions
from pmod_cli.profiling import closed_form
from pmod_cli.profiling.closed_form import CONVENTIONS, FULL, PAPER, PhaseCount
from pmod_cli.profiling.geometry import Geometry
from pmod_cli.profiling.prompt import DTYPE_BYTES, Workload, default_image_size, image_tokens
from pmod_cli.profiling.published import published_figures
from pmod_cli.profiling.result import ProfileResult, VariantProfile
from pmod_cli.profiling.subject import Subject, Variant

COUNTERS = ("auto", "fvcore", "formula")


@dataclass(frozen=True)
class Settings:
    """What to profile a model on.

    Attributes:
        image_size: (height, width) in pixels; None for the size with the most vision tokens.
        with_image: False for a prompt of text only.
        text_tokens: Text tokens per sample; None for 35, or the paper's 30 under its convention.
        new_tokens: Tokens generated per sample.
        batch: Samples.
        dtype: One of `DTYPE_BYTES`.
        all_logits: See `Workload`.
        convention: ``full`` or ``paper``.
        counter: ``fvcore`` (checked against the formula), ``formula``, or ``auto`` (fvcore where it is installed).
    """

    image_size: tuple[int, int] | None = None
    with_image: bool = True
    text_tokens: int | None = None
    new_tokens: int = 64
    batch: int = 1
    dtype: str = "bfloat16"
    all_logits: bool = True
    convention: str = "full"
    counter: str = "auto"

    def __post_init__(self) -> None:
        for name, known in (("convention", CONVENTIONS), ("counter", COUNTERS), ("dtype", DTYPE_BYTES)):
            if getattr(self, name) not in known:
                raise PmodError(f"unknown {name} {getattr(self, name)!r}", f"one of {', '.join(known)}")
        if self.batch < 1 or self.new_tokens < 1 or (self.text_tokens or 1) < 1:
            raise PmodError("batch, text tokens and new tokens must be at least 1")

    def workload(self, geometry: Geometry) -> Workload:
        """The prompt in a model's tokens."""
        size = (self.image_size or default_image_size(geometry)) if self.with_image else None
        default_text = 30 if self.convention == PAPER.name else 35
        return Workload(
            image=image_tokens(geometry, size) if size else None,
            image_size=size,
            text_tokens=self.text_tokens or default_text,
            new_tokens=self.new_tokens,
            batch=self.batch,
            dtype=self.dtype,
            all_logits=self.all_logits,
        )


def profile(
    subject: Subject,
    settings: Settings,
    measure_options: dict[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
) -> ProfileResult:
    """Count a model and its baseline, for which only configs are read; measure them if asked.

    Args:
        subject: What `find_subject` found.
        settings: The prompt, and how to count.
        measure_options: Options of `pmod_cli.profiling.latency.measure`; None to count only.
        progress: Called with a short text at each step.

    Raises:
        MissingExtraError: fvcore was asked for by name and is not installed.
        BrokenPackageError: fvcore is installed and cannot be imported.
        PmodError: See `pmod_cli.profiling.latency.measure`.
    """
    counter = _resolve_counter(settings)
    variants: dict[str, VariantProfile] = {}
    checks: dict[str, bool] = {}
    for role, variant in subject.variants.items():
        if progress:
            progress(f"counting the {'p-MoD' if role == 'pmod' else 'dense'} model ({counter})")
        phases = _formula(variant, settings)
        if counter == "fvcore":
            traced = _trace(variant, settings)
            checks["formula"] = checks.get("formula", True) and traced == phases
            phases = traced
        variants[role] = _variant_profile(variant, settings, *phases)
    latency = None
    if measure_options is not None:
        from pmod_cli.profiling.latency import measure

        works = {role: variant.work for role, variant in variants.items()}
        latency = measure(subject, works, progress=progress, **measure_options)
    geometry = subject.main.geometry
    return ProfileResult(
        model=subject.name,
        variants=variants,
        work=settings.workload(geometry),
        convention=settings.convention,
        counted_by=counter,
        checks=checks,
        published=published_figures(geometry) if settings.convention == PAPER.name else None,
        latency=latency,
        versions=versions("pmod-cli", "torch", "transformers", "fvcore"),
    )


def _resolve_counter(settings: Settings) -> str:
    if settings.convention != FULL.name:
        if settings.counter == "fvcore":
            raise PmodError(f"the {settings.convention} convention is counted by formula only")
        return "formula"
    if settings.counter == "formula" or (settings.counter == "auto" and not installed("fvcore")):
        return "formula"
    require("fvcore")
    return "fvcore"


def _formula(variant: Variant, settings: Settings) -> tuple[PhaseCount, PhaseCount]:
    """Prefill and first decode step by the closed form."""
    what = (
        variant.geometry,
        variant.mod,
        settings.workload(variant.geometry),
        CONVENTIONS[settings.convention],
    )
    return closed_form.prefill(*what), closed_form.decode_step(*what)


def _trace(variant: Variant, settings: Settings) -> tuple[PhaseCount, PhaseCount]:
    """Prefill and first decode step by fvcore; of layers that do the same work one is traced."""
    from pmod_cli.modeling.twin import meta_model
    from pmod_cli.profiling import fvcore_counter

    work = settings.workload(variant.geometry)
    short, indices = fvcore_counter.distinct_layers(variant)
    prefill, step = fvcore_counter.count(meta_model(short.config, work.dtype), work)
    return fvcore_counter.repeat_layers(prefill, indices), fvcore_counter.repeat_layers(step, indices)


def _variant_profile(
    variant: Variant, settings: Settings, prefill: PhaseCount, decode_step: PhaseCount
) -> VariantProfile:
    geometry, mod = variant.geometry, variant.mod
    work = settings.workload(geometry)
    kept = closed_form.layer_tokens(geometry, mod, work)
    return VariantProfile(
        name=variant.name,
        model_type=variant.model_type,
        retention_ratios=mod.retention_ratios if mod else None,
        work=work,
        parameters=closed_form.parameters(geometry, mod),
        prefill=prefill,
        decode_step=decode_step,
        generation_macs=closed_form.generation_macs(geometry, mod, work, CONVENTIONS[settings.convention]),
        kv_prefill=closed_form.kv_bytes(geometry, mod, work),
        kv_final=closed_form.kv_bytes(geometry, mod, work, decoded=work.new_tokens - 1),
        vision_retention=_vision_retention(variant, work, kept),
        token_retention=sum(kept) / len(kept) / work.prompt_tokens,
        traffic=closed_form.least_traffic(geometry, mod, work),
    )


def _vision_retention(variant: Variant, work: Workload, kept: list[int]) -> float | None:
    if not work.vision_tokens:
        return None
    if variant.mod and variant.mod.target_tokens == "all":
        return None  # which tokens go, text or vision, is the router's choice
    return sum(tokens - work.text_tokens for tokens in kept) / len(kept) / work.vision_tokens
