"""Contenders that take turns, and what is made of their times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from tests.benchmarks.gpu_bench.models import Pair, free_memory

WAITS = (
    "cudaStreamSynchronize",
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "Memcpy DtoH (Device -> Pageable)",
)
PMOD = "pmod"


@dataclass(frozen=True)
class Contender:
    """A model, and whether SDPA may take cuDNN while it runs.

    Attributes:
        name: `PMOD`, ``dense`` or ``dense without cuDNN``.
        model: The model.
        cudnn: None for torch's default.
    """

    name: str
    model: Any
    cudnn: bool | None = None

    @contextmanager
    def setting(self) -> Iterator[None]:
        """torch's process-wide switch, as this contender has it."""
        before = torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(before if self.cudnn is None else self.cudnn)
        try:
            yield
        finally:
            torch.backends.cuda.enable_cudnn_sdp(before)


def contenders(pair: Pair) -> list[Contender]:
    """p-MoD as a user runs it; dense with and without cuDNN's attention, of which the better counts."""
    return [
        Contender(PMOD, pair.pmod),
        Contender("dense", pair.dense, cudnn=True),
        Contender("dense without cuDNN", pair.dense, cudnn=False),
    ]


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one call, until the device is done."""
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def take_turns(
    rivals: list[Contender], repeats: int, measure: Callable[[Contender], dict[str, float]]
) -> dict[str, Any]:
    """Measure contenders by turns, each round in another order.

    Args:
        rivals: Those that run.
        repeats: Rounds.
        measure: Numbers by name of one run; a contender that runs out of memory leaves the race.

    Returns:
        See `compare`.
    """
    runs: dict[str, list[dict[str, float]]] = {rival.name: [] for rival in rivals}
    alive = list(rivals)
    for index in range(repeats):
        turn = index % len(rivals)
        for rival in rivals[turn:] + rivals[:turn]:
            if rival not in alive:
                continue
            try:
                with rival.setting():
                    runs[rival.name].append(measure(rival))
            except torch.OutOfMemoryError:
                alive.remove(rival)
                runs[rival.name] = []
            if rival not in alive:
                free_memory()
    return compare(runs)


def compare(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians of both models, and their ratios.

    Args:
        runs: By contender, the numbers of each round; the first number tells which dense contender is the better.

    Returns:
        ``pmod``, ``dense`` (medians by name, null: out of memory), ``dense_setting``, ``ratio``, ``runs``.
    """
    medians = {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} if rows else None
        for name, rows in runs.items()
    }
    dense = {name: values for name, values in medians.items() if name != PMOD and values}
    best = min(dense, key=lambda name: next(iter(dense[name].values())), default=None)
    pmod, base = medians.get(PMOD), dense[best] if best else None
    ratio = {key: pmod[key] / base[key] for key in pmod if base.get(key)} if pmod and base else {}
    return {"pmod": pmod, "dense": base, "dense_setting": best, "ratio": ratio, "runs": runs}


def recorded(call: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """One call under torch.profiler.

    Returns:
        ``busy_ms`` (the device's; null on a CPU), ``operations`` (on a GPU kernels and copies, on a CPU operators that
        call no other), ``waits`` (calls that wait for the device, by name), ``busiest`` (the ten longest kernels).
    """
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    call()
    with profile(activities=activities) as trace:
        call()
        _wait(device)
    if cuda:
        done = [event for event in trace.events() if event.device_type == DeviceType.CUDA]
    else:
        done = [
            event for event in trace.events() if not event.cpu_children and event.name.startswith("aten::")
        ]
    times: dict[str, list[float]] = {}
    for event in done:
        times.setdefault(event.name, []).append(event.time_range.elapsed_us() / 1e3)
    busiest = sorted(times, key=lambda name: -sum(times[name]))[:10]
    averages = trace.key_averages()
    return {
        "busy_ms": sum(map(sum, times.values())) if cuda else None,
        "operations": len(done),
        "waits": {event.key: event.count for event in averages if event.key in WAITS},
        "busiest": [{"name": name, "calls": len(times[name]), "ms": sum(times[name])} for name in busiest],
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
