"""Real time and real memory: prefill, decode and end to end; dense and p-MoD alternate in one process.

Every phase is warmed up, synchronised and repeated; a median comes with its spread. The KV cache's bytes are read
from the cache object that a real prefill leaves.
"""

from __future__ import annotations

import gc
import resource
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pmod_cli.devices import find_device
from pmod_cli.modeling.compat import CACHE_ARGUMENT
from pmod_cli.output.errors import PmodError
from pmod_cli.profiling.closed_form import kv_cache_dict
from pmod_cli.profiling.placement import load_models, quiet_transformers
from pmod_cli.profiling.prompt import Workload
from pmod_cli.profiling.subject import Subject


@dataclass
class _Measured:
    """Of one model: seconds of every run by phase, real bytes of KV cache by layer.

    Attributes:
        decoded: Tokens that ``decode`` made, over the whole batch.
        bound: Seconds of prefill if the layers ran on their kept tokens and did nothing else; p-MoD only.
        peak_memory: Most bytes allocated on the device in this model's runs, the other's weights included if they
            are not shared; None on a CPU.
    """

    decoded: int
    bound: list[float] | None
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    kv_prefill: list[int] = field(default_factory=list)
    kv_final: list[int] = field(default_factory=list)
    peak_memory: int | None = None

    def to_dict(self) -> dict[str, Any]:
        seconds = {phase: _timing(runs) for phase, runs in self.seconds.items()}
        return {
            "seconds": seconds,
            "decode_tokens_per_second": self.decoded / seconds["decode"]["median"] if self.decoded else None,
            "kv_cache": kv_cache_dict(self.kv_prefill, self.kv_final),
            "peak_memory_bytes": self.peak_memory,
            "kept_tokens_bound": _timing(self.bound) if self.bound else None,
        }


def _timing(runs: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(runs), "min": min(runs), "max": max(runs), "runs": runs}


def measure(
    subject: Subject,
    works: dict[str, Workload],
    device: str = "auto",
    repeats: int = 5,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure a p-MoD model and its baseline alternately, after one warm-up.

    Args:
        subject: The models; weights are random where only a config is known.
        works: The prompt of each model, by ``pmod`` and ``dense``.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` ...
        repeats: Measured runs.
        progress: Called with a short text at each step.

    Returns:
        ``latency`` of the result; ``bound_overhead`` is p-MoD's prefill over the kept-tokens-only bound, minus 1.

    Raises:
        PmodError: The device is not there or its memory too small.
    """
    target = find_device(device)
    if target.type not in ("cpu", "cuda"):
        raise PmodError(f"cannot measure on {device!r}", "cpu or cuda")
    say = progress or (lambda _text: None)
    say("loading the models")
    work = next(iter(works.values()))

    def nothing_yet(role: str) -> _Measured:
        decoded = works[role].batch * (works[role].new_tokens - 1)
        return _Measured(decoded, [] if role == "pmod" else None)

    found = {role: nothing_yet(role) for role in works}
    try:
        with quiet_transformers():
            models = load_models(subject, target, work.dtype)
            inputs = {role: make_inputs(model, works[role]) for role, model in models.items()}
            for index in range(-1, repeats):
                say(f"measuring: {'warm-up' if index < 0 else f'run {index + 1} of {repeats}'}")
                # Alternately, and in changing order, so that a drift of the machine's speed affects both alike.
                for role in list(models)[:: 1 if index % 2 else -1]:
                    into = nothing_yet(role) if index < 0 else found[role]
                    _run(models[role], works[role], inputs[role], into)
    except torch.OutOfMemoryError as error:
        hint = "a smaller --batch or image, or --dtype bfloat16"
        raise PmodError(f"out of memory on {target}", hint) from error
    name = str(target)
    if target.type == "cuda":
        name += f" ({torch.cuda.get_device_name(target)})"
    measured = {role: runs.to_dict() for role, runs in found.items()}
    overhead = None
    if pmod := measured.get("pmod"):
        overhead = pmod["seconds"]["prefill"]["median"] / pmod["kept_tokens_bound"]["median"] - 1
    return {
        "device": name,
        "dtype": work.dtype,
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "random_weights": any(variant.weights is None for variant in subject.variants.values()),
        "process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "bound_overhead": overhead,
        "models": measured,
    }


@torch.inference_mode()
def _run(model: Any, work: Workload, inputs: dict[str, Tensor], into: _Measured) -> None:
    """One prefill, the decode steps after it, a ``generate``, and the bound."""
    device = model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    gc.collect()
    with _timed(device, into.seconds["prefill"]):
        output = model(**inputs, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1:].argmax(-1)
    cache = output[CACHE_ARGUMENT]
    kept = [layer.keys.shape[-2] for layer in cache.layers]
    into.kv_prefill = _cache_bytes(cache)
    if work.new_tokens > 1:
        with _timed(device, into.seconds["decode"]):
            for _ in range(work.new_tokens - 1):
                step = {CACHE_ARGUMENT: cache, "use_cache": True, "logits_to_keep": 1}
                token = model(input_ids=token, **step).logits[:, -1:].argmax(-1)
    into.kv_final = _cache_bytes(cache)
    del cache, output
    length = {"min_new_tokens": work.new_tokens, "max_new_tokens": work.new_tokens}
    with _timed(device, into.seconds["end_to_end"]):
        model.generate(**inputs, do_sample=False, **length)
    if device.type == "cuda":
        into.peak_memory = torch.cuda.max_memory_allocated(device)
    if into.bound is not None:
        _run_bound(model, work, inputs, kept, into.bound)


def _run_bound(
    model: Any, work: Workload, inputs: dict[str, Tensor], kept: list[int], runs: list[float]
) -> None:
    """A prefill in which each layer sees its kept tokens only.

    The vision tower, the same layers as plain decoder layers on as many tokens as they keep, and the LM head: no
    router, no choice, no gathering and scattering.
    """
    decoder, width, device = model.model.language_model, model.config.text_config.hidden_size, model.device
    states = torch.randn(work.batch, work.prompt_tokens, width, dtype=model.dtype, device=device)
    positions = torch.arange(work.prompt_tokens, device=device)[None]
    images = {key: value for key, value in inputs.items() if key in ("pixel_values", "image_sizes")}
    with _timed(device, runs):
        if images:
            model.get_image_features(**images)
        tables = decoder.rotary_emb(states, position_ids=positions)
        for layer, count in zip(decoder.layers, kept, strict=True):
            if count:
                # Without a routing plan an MoD layer is the plain decoder layer.
                layer(
                    states[:, :count],
                    attention_mask=None,
                    position_ids=positions[:, :count],
                    position_embeddings=tuple(table[:, :count] for table in tables),
                )
        model.lm_head(decoder.norm(states[:, -1:]))


@contextmanager
def _timed(device: torch.device, runs: list[float]) -> Iterator[None]:
    """Adds the seconds that its block takes, until the device has done all of it."""
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    wait()
    start = time.perf_counter()
    yield
    wait()
    runs.append(time.perf_counter() - start)


def _cache_bytes(cache: Any) -> list[int]:
    """Bytes of keys and values of each layer of a KV cache, from the tensors themselves."""
    return [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]


def make_inputs(model: Any, work: Workload) -> dict[str, Tensor]:
    """What the model's processor would give for one image and some text per sample; pixels and words are random."""
    generator = torch.Generator().manual_seed(0)
    config = model.config
    shape = work.batch, work.text_tokens
    words = torch.randint(0, config.text_config.vocab_size - 1, shape, generator=generator)
    words += words >= config.image_token_id  # any id but the image token's
    image = torch.full((work.batch, work.vision_tokens), config.image_token_id)
    prompt = torch.cat([words[:, :1], image, words[:, 1:]], dim=1)
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    if work.image:
        vision = config.vision_config
        tile: tuple[int, ...] = (vision.num_channels, vision.image_size, vision.image_size)
        if hasattr(config, "image_grid_pinpoints"):
            tile = (work.image.crops, *tile)
            inputs["image_sizes"] = torch.tensor([work.image_size] * work.batch)
        inputs["pixel_values"] = torch.randn(work.batch, *tile, generator=generator).to(model.dtype)
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}
