"""Real time and real memory: prefill, decode and end to end; dense and p-MoD alternate in one process.

Every phase is warmed up, synchronised and repeated; a median comes with its spread. The KV cache's bytes are read
from the cache object that a real prefill leaves.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pmod_cli.devices import find_device
from pmod_cli.output.errors import PmodError
from pmod_cli.profiling.bench import Bench, Measured
from pmod_cli.profiling.placement import load_models, quiet_transformers
from pmod_cli.profiling.prompt import Workload
from pmod_cli.profiling.subject import Subject


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
    """Measure a p-MoD model and its baseline alternately.

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
    target = find_device(device)
    if target.type not in ("cpu", "cuda"):
        raise PmodError(f"cannot measure on {device!r}", "cpu or cuda")
    say = progress or (lambda _text: None)
    say("loading the models")
    work = next(iter(works.values()))
    try:
        models = load_models(subject, target, work.dtype)
        benches = {role: Bench(model, works[role]) for role, model in models.items()}
        for index in range(-warmup, repeats):
            say(f"measuring: {'warm-up' if index < 0 else f'run {index + 1} of {repeats}'}")
            # Alternately, and in changing order, so that a drift of the machine's speed affects both alike.
            for role, bench in list(benches.items())[:: 1 if index % 2 else -1]:
                with quiet_transformers():
                    bench.run(count=index >= 0, bound=role == "pmod")
    except torch.OutOfMemoryError as error:
        hint = "a smaller --batch or image, or --dtype bfloat16"
        raise PmodError(f"out of memory on {target}", hint) from error
    name = f"{target} ({torch.cuda.get_device_name(target)})" if target.type == "cuda" else str(target)
    return Latency(
        device=name,
        dtype=work.dtype,
        threads=torch.get_num_threads(),
        repeats=repeats,
        random_weights=any(variant.weights is None for variant in subject.variants.values()),
        batch=work.batch,
        models={role: bench.measured for role, bench in benches.items()},
        process_peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )
