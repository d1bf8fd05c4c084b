"""Real time and real memory: prefill, decode and end to end; dense and p-MoD alternate in one process.

Every phase is warmed up, synchronised and repeated; a median comes with its spread. A prefill is also timed at prompt
lengths that the process has not seen, since that is what users meet. The KV cache's bytes are read from the cache
object that a real prefill leaves. The dense model runs with the attention back ends that are fastest for it.
"""

from __future__ import annotations

import gc
import resource
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pmod_cli.checkpoints.load import quiet_transformers
from pmod_cli.devices import find_device
from pmod_cli.kernels import use_kernels
from pmod_cli.modeling.compat import CACHE_ARGUMENT
from pmod_cli.output.errors import PmodError
from pmod_cli.profiling.closed_form import kv_cache_dict
from pmod_cli.profiling.operators import OperatorCount, device_busy
from pmod_cli.profiling.options import ProfileOptions
from pmod_cli.profiling.placement import load_models
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
        kernels: Fused kernels in use, see `use_kernels`.
        without_cudnn: Whether torch's SDPA was kept from cuDNN, which is faster for this model.
        operators: Dispatched operators of a prefill and of a decode step, see `OperatorCount`.
        synchronisations: How often the host reads from the device in each of the two; None on a CPU.
        busy: Seconds in which the device works in each of the two; None on a CPU.
    """

    decoded: int
    bound: list[float] | None
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    kv_prefill: list[int] = field(default_factory=list)
    kv_final: list[int] = field(default_factory=list)
    peak_memory: int | None = None
    kernels: list[str] = field(default_factory=list)
    without_cudnn: bool = False
    operators: dict[str, int] = field(default_factory=dict)
    synchronisations: dict[str, int] | None = None
    busy: dict[str, float] | None = None

    def attention(self) -> AbstractContextManager[None]:
        """In it the model's attention runs as it is fastest; afterwards torch's setting is as before."""
        return _without_cudnn() if self.without_cudnn else nullcontext()

    def to_dict(self) -> dict[str, Any]:
        seconds = {phase: _timing(runs) for phase, runs in self.seconds.items()}
        return {
            "seconds": seconds,
            "decode_tokens_per_second": self.decoded / seconds["decode"]["median"] if self.decoded else None,
            "kv_cache": kv_cache_dict(self.kv_prefill, self.kv_final),
            "peak_memory_bytes": self.peak_memory,
            "kept_tokens_bound": _timing(self.bound) if self.bound else None,
            "kernels": self.kernels,
            "without_cudnn": self.without_cudnn,
            "operators": self.operators,
            "synchronisations": self.synchronisations,
            "device_busy_seconds": self.busy,
        }


def _timing(runs: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(runs), "min": min(runs), "max": max(runs), "runs": runs}


def measure(
    subject: Subject,
    works: dict[str, Workload],
    options: ProfileOptions | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure a p-MoD model and its baseline alternately, after one warm-up.

    Args:
        subject: The models; weights are random where only a config is known.
        works: The prompt of each model, by ``pmod`` and ``dense``.
        options: Of which device, repeats, kernels and cache are read.
        progress: Called with a short text at each step.

    Returns:
        ``latency`` of the result; ``bound_overhead`` is p-MoD's prefill over the kept-tokens-only bound, minus 1.

    Raises:
        PmodError: The device is not there, its memory too small, or it lacks the kernels that were asked for.
    """
    options = options or ProfileOptions()
    target = find_device(options.device)
    if target.type not in ("cpu", "cuda"):
        raise PmodError(f"cannot measure on {options.device!r}", "cpu or cuda")
    say = progress or (lambda _text: None)
    say("loading the models")
    dtype = next(iter(works.values())).dtype
    found = {
        role: _Measured(work.batch * (work.new_tokens - 1), [] if role == "pmod" else None)
        for role, work in works.items()
    }
    static = options.cache == "static"
    try:
        with quiet_transformers():
            models = load_models(subject, target, dtype, options.allow_pickle)
            inputs = {role: make_inputs(model, works[role]) for role, model in models.items()}
            for role, model in models.items():
                say("warm-up")
                found[role].kernels = use_kernels(model, options.kernels)
                _warm_up(model, works[role], inputs[role], found[role], static)
            for index in range(options.repeats):
                say(f"measuring: run {index + 1} of {options.repeats}")
                # Alternately, and in changing order, so that a drift of the machine's speed affects both alike.
                for role in list(models)[:: 1 if index % 2 else -1]:
                    # A length for each, since what one model has prepared may serve the other.
                    longer = works[role].text_tokens + 1 + 2 * index + (role == "dense")
                    new = make_inputs(models[role], replace(works[role], text_tokens=longer))
                    with found[role].attention():
                        _first_prefill(models[role], new, found[role])
                        _run(models[role], works[role], inputs[role], found[role], static)
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
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "repeats": options.repeats,
        "cache": options.cache,
        "random_weights": any(variant.weights is None for variant in subject.variants.values()),
        "process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "bound_overhead": overhead,
        "models": measured,
    }


def _warm_up(model: Any, work: Workload, inputs: dict[str, Tensor], into: _Measured, static: bool) -> None:
    """Run everything once unmeasured; find the model's best attention; count what a prefill and a step dispatch."""
    trials = {}
    # A p-MoD model never asks torch which back end to take.
    for without in (False, True) if model.device.type == "cuda" and into.bound is None else (False,):
        into.without_cudnn = without
        for _ in range(2):
            trial = replace(into, seconds=defaultdict(list), bound=None if into.bound is None else [])
            with trial.attention():
                _run(model, work, inputs, trial, static)
        trials[without] = trial.seconds["end_to_end"][0]
    into.without_cudnn = min(trials, key=lambda without: trials[without])
    cache: Any = None

    def prefill() -> None:
        nonlocal cache
        cache = model(**inputs, use_cache=True, logits_to_keep=1)[CACHE_ARGUMENT]

    def decode_step() -> None:
        model(input_ids=inputs["input_ids"][:, -1:], use_cache=True, **{CACHE_ARGUMENT: cache})

    with torch.inference_mode(), into.attention():
        for name, call in (("prefill", prefill), ("decode_step", decode_step)):
            with OperatorCount() as count:
                call()
            into.operators[name] = count.total
            if model.device.type == "cuda":
                into.synchronisations = (into.synchronisations or {}) | {name: count.synchronisations}
                into.busy = (into.busy or {}) | {name: device_busy(call)}


@torch.inference_mode()
def _first_prefill(model: Any, inputs: dict[str, Tensor], into: _Measured) -> None:
    """A prefill of a length that the process has not seen."""
    with _timed(model.device, into.seconds["first_prefill"]):
        model(**inputs, use_cache=True, logits_to_keep=1)


@contextmanager
def _without_cudnn() -> Iterator[None]:
    """Keep torch's SDPA from cuDNN, in the whole process."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@torch.inference_mode()
def _run(model: Any, work: Workload, inputs: dict[str, Tensor], into: _Measured, static: bool) -> None:
    """One prefill, the decode steps after it, a ``generate``, and the bound.

    With a static cache, whose steps ``generate`` compiles on a GPU, decoding is what a ``generate`` takes beyond its
    first token.
    """
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
        with _timed(device, [] if static else into.seconds["decode"]):
            for _ in range(work.new_tokens - 1):
                step = {CACHE_ARGUMENT: cache, "use_cache": True, "logits_to_keep": 1}
                token = model(input_ids=token, **step).logits[:, -1:].argmax(-1)
    into.kv_final = _cache_bytes(cache)
    del cache, output

    def generate(tokens: int, runs: list[float]) -> None:
        settings: dict[str, Any] = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False}
        if static:
            settings["cache_implementation"] = "static"
        with _timed(device, runs):
            model.generate(**inputs, **settings)

    generate(work.new_tokens, into.seconds["end_to_end"])
    if static and work.new_tokens > 1:
        first: list[float] = []
        generate(1, first)
        into.seconds["decode"].append(max(into.seconds["end_to_end"][-1] - first[0], 1e-9))
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
    decoder, width, device = model.get_decoder(), model.config.text_config.hidden_size, model.device
    states = torch.randn(work.batch, work.prompt_tokens, width, dtype=model.dtype, device=device)
    positions = torch.arange(work.prompt_tokens, device=device)[None]
    # Time, height and width, where the rotary embedding tells them apart.
    axes = positions.expand(3, 1, -1) if hasattr(decoder.rotary_emb, "mrope_section") else positions
    images = {
        key: value
        for key, value in inputs.items()
        if key in ("pixel_values", "image_sizes", "image_grid_thw")
    }
    with _timed(device, runs):
        if images:
            model.get_image_features(**images)
        tables = decoder.rotary_emb(states, position_ids=axes)
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
        inputs |= _picture_inputs(config, work, prompt == config.image_token_id, generator)
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def _picture_inputs(
    config: Any, work: Workload, image: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """Random pixels as the family takes them, with what it wants to know of them; ``image`` marks its tokens."""
    assert work.image is not None
    vision, (rows, columns), crops = config.vision_config, work.image.patches, work.image.crops
    side = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
    if hasattr(vision, "spatial_merge_size"):
        grid = torch.tensor([[1, rows, columns]] * work.batch)
        values = vision.in_channels * vision.temporal_patch_size * side**2
        return {
            "pixel_values": torch.randn(work.batch * rows * columns, values, generator=generator),
            "image_grid_thw": grid,
            "mm_token_type_ids": image.long(),
        }
    shape: tuple[int, ...] = (work.batch, crops, vision.num_channels, rows * side, columns * side)
    sizes = {}
    if hasattr(config, "image_grid_pinpoints"):
        sizes["image_sizes"] = torch.tensor([work.image_size] * work.batch)
    elif not hasattr(config, "scale_factor"):  # inputs in one list
        shape = (work.batch * crops, *shape[2:])
    return {"pixel_values": torch.randn(shape, generator=generator), **sizes}
