"""Puts a profile together: find the two models, count, and measure if asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pmod_cli import __version__
from pmod_cli.extras import installed, require
from pmod_cli.output.errors import PmodError
from pmod_cli.profiling import closed_form
from pmod_cli.profiling.closed_form import CONVENTIONS, FULL, PAPER, TORCH, PhaseCount
from pmod_cli.profiling.geometry import Geometry
from pmod_cli.profiling.prompt import DTYPE_BYTES, Workload, default_image_size, image_tokens
from pmod_cli.profiling.published import published_figures
from pmod_cli.profiling.result import ProfileResult, VariantProfile
from pmod_cli.profiling.subject import Subject, Variant, find_subject

COUNTERS = ("auto", "fvcore", "torch", "formula", "all")


@dataclass(frozen=True)
class Settings:
    """What to profile a model on.

    Attributes:
        image_size: (height, width) in pixels; None for the size with the most vision tokens.
        with_image: False for a prompt of text only.
        text_tokens: Text tokens a sample; None for 35, or the paper's 30 under its convention.
        new_tokens: Tokens generated a sample.
        batch: Samples.
        dtype: One of `DTYPE_BYTES`.
        all_logits: See `Workload`.
        convention: ``full`` or ``paper``.
        counter: ``fvcore``, ``torch``, ``formula``, ``all`` (fvcore, the others checked against it) or ``auto``
            (fvcore where it is installed).
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
        if self.convention not in CONVENTIONS:
            raise PmodError(f"unknown convention {self.convention!r}", "full or paper")
        if self.counter not in COUNTERS:
            raise PmodError(f"unknown counter {self.counter!r}", f"one of {', '.join(COUNTERS)}")
        if self.dtype not in DTYPE_BYTES:
            raise PmodError(f"unknown dtype {self.dtype!r}", f"one of {', '.join(DTYPE_BYTES)}")
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


def profile_checkpoint(
    model_path: str | Path,
    baseline: str | Path | None = "auto",
    *,
    recipe: str | None = None,
    latency: bool = False,
    device: str = "auto",
    repeats: int = 5,
    progress: Callable[[str], None] | None = None,
    **settings: Any,
) -> ProfileResult:
    """Profile a checkpoint against its dense baseline.

    Args:
        model_path: Checkpoint folder, hub id, ``config.json``, or name of a recipe or geometry.
        baseline: ``auto`` (the same model with every layer dense), another model, or None.
        recipe: How a dense MODEL would become p-MoD; the paper's settings by default.
        latency: Measure as well as count.
        device: Where to measure; ``auto`` is a GPU if there is one.
        repeats: Measured runs of each phase.
        progress: Called with a short text at each step.
        **settings: See `Settings`.

    Raises:
        PmodError: See `find_subject` and `Settings`.
        MissingExtraError: fvcore was asked for by name and is not installed.
        BrokenPackageError: fvcore is installed and cannot be imported.
    """
    subject = find_subject(str(model_path), recipe=recipe, baseline=str(baseline or "none"))
    options = {"device": device, "repeats": repeats} if latency else None
    return profile_subject(subject, Settings(**settings), options, progress)


def profile_subject(
    subject: Subject,
    settings: Settings,
    measure_options: dict[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
) -> ProfileResult:
    """Count, and measure unless ``measure_options`` (see `pmod_cli.profiling.latency.measure`) is None."""
    result = profile(subject, settings, progress)
    if measure_options is None:
        return result
    from pmod_cli.profiling.latency import measure

    works = {role: variant.work for role, variant in result.variants.items()}
    return dataclasses.replace(result, latency=measure(subject, works, progress=progress, **measure_options))


def profile(
    subject: Subject, settings: Settings, progress: Callable[[str], None] | None = None
) -> ProfileResult:
    """Count a model and its baseline; nothing is loaded but configs.

    Args:
        subject: What `find_subject` found.
        settings: The prompt, and how to count.
        progress: Called with a short text at each step.

    Raises:
        MissingExtraError: fvcore was asked for by name and is not installed.
        BrokenPackageError: fvcore is installed and cannot be imported.
    """
    counter = _resolve_counter(settings)
    variants: dict[str, VariantProfile] = {}
    checks: dict[str, bool] = {}
    for role, variant in subject.variants.items():
        if progress:
            progress(f"counting the {'p-MoD' if role == 'pmod' else 'dense'} model ({counter})")
        variants[role], agreed = _count(variant, settings, counter)
        for name, agrees in agreed.items():
            checks[name] = agrees and checks.get(name, True)
    geometry = subject.main.geometry
    return ProfileResult(
        model=subject.name,
        variants=variants,
        work=settings.workload(geometry),
        convention=settings.convention,
        counted_by="fvcore" if counter == "all" else counter,
        checks=checks,
        published=published_figures(geometry) if settings.convention == PAPER.name else None,
        latency=None,
        versions=_versions(),
    )


def _resolve_counter(settings: Settings) -> str:
    if settings.convention != FULL.name:
        if settings.counter not in ("auto", "formula"):
            raise PmodError(f"the {settings.convention} convention is counted by formula only")
        return "formula"
    if settings.counter == "auto" and not installed("fvcore"):
        return "formula"
    if settings.counter in ("auto", "fvcore", "all"):
        require("fvcore")
    return "fvcore" if settings.counter == "auto" else settings.counter


def _count(variant: Variant, settings: Settings, counter: str) -> tuple[VariantProfile, dict[str, bool]]:
    geometry, mod = variant.geometry, variant.mod
    work = settings.workload(geometry)
    convention = CONVENTIONS[settings.convention]
    phases = _formula(variant, work, convention)
    checks: dict[str, bool] = {}
    if counter != "formula":
        from pmod_cli.modeling.twin import meta_model
        from pmod_cli.profiling.paths import distinct_layers, repeat_layers

        short, places = distinct_layers(variant)
        model = meta_model(short.config, work.dtype)
        if counter in ("torch", "all"):
            from pmod_cli.profiling import torch_counter

            prefill, step = torch_counter.count(model, work)
            phases = repeat_layers(prefill, places), repeat_layers(step, places)
            checks["torch" if counter == "all" else "formula"] = phases == _formula(variant, work, TORCH)
        if counter in ("fvcore", "all"):
            from pmod_cli.profiling import trace

            prefill, step = trace.count(model, work)
            phases = repeat_layers(prefill, places), repeat_layers(step, places)
            checks["formula"] = phases == _formula(variant, work, FULL)
    kept = closed_form.layer_tokens(geometry, mod, work)
    used = TORCH if counter == "torch" else convention
    profile = VariantProfile(
        name=variant.name,
        model_type=variant.model_type,
        retention_ratios=mod.retention_ratios if mod else None,
        work=work,
        parameters=closed_form.parameters(geometry, mod),
        prefill=phases[0],
        decode_step=phases[1],
        generation_macs=closed_form.generation_macs(geometry, mod, work, used),
        kv_prefill=closed_form.kv_bytes(geometry, mod, work),
        kv_final=closed_form.kv_bytes(geometry, mod, work, decoded=work.new_tokens - 1),
        vision_retention=_vision_retention(variant, work, kept),
        token_retention=sum(kept) / len(kept) / work.prompt_tokens,
        traffic=closed_form.least_traffic(geometry, mod, work),
    )
    return profile, checks


def _formula(
    variant: Variant, work: Workload, convention: closed_form.Convention
) -> tuple[PhaseCount, PhaseCount]:
    geometry, mod = variant.geometry, variant.mod
    return (
        closed_form.prefill(geometry, mod, work, convention),
        closed_form.decode_step(geometry, mod, work, convention),
    )


def _vision_retention(variant: Variant, work: Workload, kept: list[int]) -> float | None:
    if not work.vision_tokens:
        return None
    if variant.mod and variant.mod.target_tokens == "all":
        return None  # which tokens go, text or vision, is the router's choice
    return sum(tokens - work.text_tokens for tokens in kept) / len(kept) / work.vision_tokens


def _versions() -> dict[str, str]:
    found = {"pmod-cli": __version__}
    for package in ("torch", "transformers", "fvcore"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
