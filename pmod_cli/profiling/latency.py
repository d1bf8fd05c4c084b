"""Real time and real memory: prefill, decode and end to end, dense and p-MoD by turns in one process.

Every phase is warmed up, synchronised and repeated; a median comes with its spread. The KV cache's bytes are read
from the cache object that a real prefill leaves.
"""

from __future__ import annotations

import gc
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pmod_cli.errors import PmodError
from pmod_cli.profiling.loading import load_models
from pmod_cli.profiling.paths import CACHE_ARGUMENT, cache_bytes, cache_lengths
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
        peak_memory: Most bytes allocated on the device; None on a CPU.
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
    say = progress or (lambda _text: None)
    say("loading the models")
    try:
        models = load_models(subject, place, next(iter(works.values())).dtype)
        found = {role: Measured(works[role].new_tokens - 1) for role in models}
        benches = {role: _Bench(model, works[role]) for role, model in models.items()}
        bound = benches["pmod"].bound if "pmod" in benches else None
        samples: dict[tuple[str, str], list[float]] = {}
        for turn in range(-warmup, repeats):
            say(f"measuring: {'warm-up' if turn < 0 else f'run {turn + 1} of {repeats}'}")
            # By turns, and in changing order, so that a drift of the machine's speed hits both alike.
            order = list(benches.items())[:: 1 if turn % 2 else -1]
            for role, bench in order:
                times, cache_sizes, peak = bench.run()
                found[role].kv_prefill, found[role].kv_final = cache_sizes
                found[role].peak_memory = peak
                if role == "pmod" and bound:
                    times["bound"] = bound()
                if turn >= 0:
                    for phase, seconds in times.items():
                        samples.setdefault((role, phase), []).append(seconds)
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


class _Bench:
    """One model with one prompt."""

    def __init__(self, model: Any, work: Workload) -> None:
        self.model, self.work = model, work
        self.inputs = make_inputs(model, work)
        self.kept: list[int] = []

    @torch.inference_mode()
    def run(self) -> tuple[dict[str, float], tuple[list[int], list[int]], int | None]:
        """One prefill, the decode steps after it, and one ``generate``.

        Returns:
            Seconds by phase, bytes of KV cache by layer after the prompt and at the end, peak memory.
        """
        cuda = self.model.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.model.device)
        gc.collect()
        start = self._clock()
        output = self.model(**self.inputs, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1:].argmax(-1)
        prefilled = self._clock()
        cache = output[CACHE_ARGUMENT]
        self.kept = cache_lengths(cache)
        after_prefill = cache_bytes(cache)
        times = {"prefill": prefilled - start}
        if self.work.new_tokens > 1:
            start = self._clock()
            for _ in range(self.work.new_tokens - 1):
                step = {CACHE_ARGUMENT: cache, "use_cache": True, "logits_to_keep": 1}
                token = self.model(input_ids=token, **step).logits[:, -1:].argmax(-1)
            times["decode"] = self._clock() - start
        sizes = (after_prefill, cache_bytes(cache))
        del cache, output
        start = self._clock()
        self.model.generate(
            **self.inputs,
            do_sample=False,
            min_new_tokens=self.work.new_tokens,
            max_new_tokens=self.work.new_tokens,
        )
        times["end_to_end"] = self._clock() - start
        return times, sizes, torch.cuda.max_memory_allocated(self.model.device) if cuda else None

    @torch.inference_mode()
    def bound(self) -> float:
        """Seconds of a prefill in which each layer sees its kept tokens only.

        The vision tower, the same layers as plain decoder layers on as many tokens as they keep, and the LM head: no
        router, no choice, no gathering and scattering.
        """
        model = self.model
        decoder, width = model.model.language_model, model.config.text_config.hidden_size
        batch, tokens = self.work.batch, self.work.prompt_tokens
        states = torch.randn(batch, tokens, width, dtype=model.dtype, device=model.device)
        positions = torch.arange(tokens, device=model.device)[None]
        images = {key: value for key, value in self.inputs.items() if key in ("pixel_values", "image_sizes")}
        start = self._clock()
        if images:
            model.get_image_features(**images)
        tables = decoder.rotary_emb(states, position_ids=positions)
        for layer, kept in zip(decoder.layers, self.kept, strict=True):
            if kept:
                # Without a routing plan an MoD layer is the plain decoder layer.
                layer(
                    states[:, :kept],
                    attention_mask=None,
                    position_ids=positions[:, :kept],
                    position_embeddings=tuple(table[:, :kept] for table in tables),
                )
        model.lm_head(decoder.norm(states[:, -1:]))
        return self._clock() - start

    def _clock(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()


def make_inputs(model: Any, work: Workload) -> dict[str, Tensor]:
    """What the model's processor would give for one image and some text a sample; pixels and words are random.

    Args:
        model: The model to be run.
        work: How many tokens.
    """
    generator = torch.Generator().manual_seed(0)
    image_token = model.config.image_token_id
    words = torch.randint(
        0, model.config.text_config.vocab_size - 1, (work.batch, work.text_tokens), generator=generator
    )
    words += words >= image_token  # any id but the image token's
    image = torch.full((work.batch, work.vision_tokens), image_token)
    prompt = torch.cat([words[:, :1], image, words[:, 1:]], dim=1)
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    if work.image:
        vision = model.config.vision_config
        shape: tuple[int, ...] = (vision.num_channels, vision.image_size, vision.image_size)
        if hasattr(model.config, "image_grid_pinpoints"):
            shape = (work.image.crops, *shape)
            inputs["image_sizes"] = torch.tensor([work.image_size] * work.batch)
        pixels = torch.randn(work.batch, *shape, generator=generator)
        inputs["pixel_values"] = pixels.to(model.dtype)
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def find_device(name: str) -> torch.device:
    """The device of a name; ``auto`` is a GPU if there is one, else the CPU.

    Raises:
        PmodError: No such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise PmodError(f"unknown device {name!r}", "e.g. cpu, cuda, cuda:1") from error
    if device.type not in ("cpu", "cuda"):
        raise PmodError(f"cannot measure on {name!r}", "cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise PmodError(f"no device {name} here", "--device cpu")
    return device
