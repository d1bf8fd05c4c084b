"""Real time and real memory: prefill, decode and end to end, dense and p-MoD by turns in one process.

Every phase is warmed up, synchronised and repeated; a median comes with its spread. The KV cache's bytes are read
from the cache object that a real prefill leaves.
"""

from __future__ import annotations

import resource
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from pmod_cli.devices import find_device
from pmod_cli.output.errors import PmodError
from pmod_cli.profiling.bench import Bench
from pmod_cli.profiling.loading import load_models, quiet_transformers
from pmod_cli.profiling.prompt import Workload
from pmod_cli.profiling.subject import Subject

PHASES = ("prefill", "decode", "end_to_end")


@dataclass(frozen=True)
class Timing:
    """Seconds of one phase over the repeats."""

    seconds: list[float]

    @property
    def median(self) -> float:
        """Middle of the repeats."""
        return statistics.median(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: median, fastest, slowest, and every run in its order."""
        return {
            "median": self.median,
            "min": min(self.seconds),
            "max": max(self.seconds),
            "runs": self.seconds,
        }


@dataclass
class Measured:
    """What was measured of one model.

    Attributes:
        seconds: By phase: ``prefill`` (time to first token, image included), ``decode`` (all further tokens),
            ``end_to_end`` (``generate``).
        decoded: Tokens a sample that ``decode`` made.
        kv_prefill: Real bytes of KV cache by layer after the prompt.
        kv_final: Real bytes of KV cache by layer when the last token was generated.
        peak_memory: Most bytes allocated on the device in this model's turn, the other's weights included if they
            are not shared; None on a CPU.
        bound: Seconds of prefill if the layers ran on their kept tokens and did nothing else; p-MoD only.
    """

    decoded: int
    seconds: dict[str, Timing] = field(default_factory=dict)
    kv_prefill: list[int] = field(default_factory=list)
    kv_final: list[int] = field(default_factory=list)
    peak_memory: int | None = None
    bound: Timing | None = None

    def to_dict(self, batch: int) -> dict[str, Any]:
        """For JSON."""
        decode = self.seconds["decode"].median if self.decoded else None
        return {
            "seconds": {phase: timing.to_dict() for phase, timing in self.seconds.items()},
            "decode_tokens_per_second": batch * self.decoded / decode if decode else None,
            "kv_cache": {
                "prefill_bytes": sum(self.kv_prefill),
                "final_bytes": sum(self.kv_final),
                "prefill_layers": self.kv_prefill,
                "final_layers": self.kv_final,
            },
            "peak_memory_bytes": self.peak_memory,
            "kept_tokens_bound": self.bound.to_dict() if self.bound else None,
        }


@dataclass(frozen=True)
class Latency:
    """A measurement of one or two models.

    Attributes:
        device: E.g. ``cuda:0 (NVIDIA H100)``.
        dtype: Of weights and cache.
        threads: CPU threads of torch.
        repeats: Measured runs of each phase.
        random_weights: Whether only a config was known and the weights are random.
        batch: Samples.
        models: By ``pmod`` and ``dense``.
        process_peak: Most resident memory of the whole process, bytes.
    """

    device: str
    dtype: str
    threads: int
    repeats: int
    random_weights: bool
    batch: int
    models: dict[str, Measured]
    process_peak: int

    @property
    def ratios(self) -> dict[str, float]:
        """p-MoD's median divided by dense's, by ``<phase>_seconds``; empty if there is only one model."""
        if len(self.models) < 2:
            return {}
        pmod, dense = self.models["pmod"].seconds, self.models["dense"].seconds
        return {f"{phase}_seconds": pmod[phase].median / dense[phase].median for phase in dense}

    @property
    def bound_overhead(self) -> float | None:
        """p-MoD's prefill over the kept-tokens-only bound, minus 1."""
        pmod = self.models.get("pmod")
        if pmod is None or pmod.bound is None:
            return None
        return pmod.seconds["prefill"].median / pmod.bound.median - 1

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "device": self.device,
            "dtype": self.dtype,
            "threads": self.threads,
            "repeats": self.repeats,
            "random_weights": self.random_weights,
            "process_peak_bytes": self.process_peak,
            "bound_overhead": self.bound_overhead,
            "models": {role: measured.to_dict(self.batch) for role, measured in self.models.items()},
        }


def measure(
    subject: Subject,
    works: dict[str, Workload],
    *,
    device: str = "auto",
    repeats: int = 5,
    warmup: int = 1,
    progress: Callable[[str], None] | None = None,
) -> Latency:
    """Measure a p-MoD model and its baseline by turns.

    Args:
        subject: The models; weights are random where only a config is known.
        works: The prompt of each model, by ``pmod`` and ``dense``.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` ...
        repeats: Measured runs.
        warmup: Runs before them that do not count.
        progress: Called with a short text at each step.

    Raises:
        PmodError: The device is not there or its memory too small.
    """
    if repeats < 1:
        raise PmodError("--repeats must be at least 1")
    place = find_device(device)
    if place.type not in ("cpu", "cuda"):
        raise PmodError(f"cannot measure on {device!r}", "cpu or cuda")
    say = progress or (lambda _text: None)
    say("loading the models")
    try:
        models = load_models(subject, place, next(iter(works.values())).dtype)
        found = {role: Measured(works[role].new_tokens - 1) for role in models}
        benches = {role: Bench(model, works[role]) for role, model in models.items()}
        samples: dict[tuple[str, str], list[float]] = {}
        for index in range(-warmup, repeats):
            say(f"measuring: {'warm-up' if index < 0 else f'run {index + 1} of {repeats}'}")
            # By turns, and in changing order, so that a drift of the machine's speed hits both alike.
            for role, bench in list(benches.items())[:: 1 if index % 2 else -1]:
                with quiet_transformers():
                    turn = bench.run()
                seconds = dict(turn.seconds)
                if role == "pmod":
                    seconds["bound"] = bench.bound()
                found[role].kv_prefill, found[role].kv_final = turn.kv_prefill, turn.kv_final
                found[role].peak_memory = turn.peak_memory
                if index >= 0:
                    for phase, value in seconds.items():
                        samples.setdefault((role, phase), []).append(value)
    except torch.OutOfMemoryError as error:
        raise PmodError(
            f"out of memory on {place}", "a smaller --batch or image, or --dtype bfloat16"
        ) from error
    for (role, phase), runs in samples.items():
        if phase == "bound":
            found[role].bound = Timing(runs)
        else:
            found[role].seconds[phase] = Timing(runs)
    name = f"{place} ({torch.cuda.get_device_name(place)})" if place.type == "cuda" else str(place)
    return Latency(
        device=name,
        dtype=next(iter(works.values())).dtype,
        threads=torch.get_num_threads(),
        repeats=repeats,
        random_weights=any(variant.weights is None for variant in subject.variants.values()),
        batch=next(iter(works.values())).batch,
        models=found,
        process_peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )
