"""One model and one prompt, ready to be timed: prefill, decode, ``generate``, and the kept-tokens-only bound."""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pmod_cli.modeling.compat import CACHE_ARGUMENT
from pmod_cli.profiling.prompt import Workload
from pmod_cli.profiling.result import kv_cache_dict


@dataclass(frozen=True)
class Timing:
    """Seconds of one phase over the repeats."""

    seconds: list[float] = field(default_factory=list)

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
        decoded: Tokens per sample that ``decode`` made.
        seconds: By phase: ``prefill`` (time to first token, image included), ``decode`` (all further tokens, if there
            are any), ``end_to_end`` (``generate``).
        kv_prefill: Real bytes of KV cache by layer after the prompt.
        kv_final: Real bytes of KV cache by layer when the last token was generated.
        peak_memory: Most bytes allocated on the device in this model's runs, the other's weights included if they
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
            "kv_cache": kv_cache_dict(self.kv_prefill, self.kv_final),
            "peak_memory_bytes": self.peak_memory,
            "kept_tokens_bound": self.bound.to_dict() if self.bound else None,
        }


class Bench:
    """One model with one prompt."""

    def __init__(self, model: Any, work: Workload) -> None:
        self.model, self.work = model, work
        self.inputs = make_inputs(model, work)
        self.measured = Measured(work.new_tokens - 1)
        self.kept: list[int] = []

    def run(self, count: bool, bound: bool) -> None:
        """Run every phase once.

        Args:
            count: Whether the times count; a warm-up's do not.
            bound: Whether to time the kept-tokens-only bound, too.
        """
        seconds = self._phases()
        bound_seconds = self._bound() if bound else None
        if not count:
            return
        for phase, value in seconds.items():
            self.measured.seconds.setdefault(phase, Timing()).seconds.append(value)
        if bound_seconds is not None:
            self.measured.bound = self.measured.bound or Timing()
            self.measured.bound.seconds.append(bound_seconds)

    @torch.inference_mode()
    def _phases(self) -> dict[str, float]:
        """Seconds of one prefill, the decode steps after it, and one ``generate``; notes their memory."""
        device, measured = self.model.device, self.measured
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        gc.collect()
        start = self._clock()
        output = self.model(**self.inputs, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1:].argmax(-1)
        seconds = {"prefill": self._clock() - start}
        cache = output[CACHE_ARGUMENT]
        self.kept = [layer.keys.shape[-2] for layer in cache.layers]
        measured.kv_prefill = _cache_bytes(cache)
        if measured.decoded:
            start = self._clock()
            for _ in range(measured.decoded):
                step = {CACHE_ARGUMENT: cache, "use_cache": True, "logits_to_keep": 1}
                token = self.model(input_ids=token, **step).logits[:, -1:].argmax(-1)
            seconds["decode"] = self._clock() - start
        measured.kv_final = _cache_bytes(cache)
        del cache, output
        length = {"min_new_tokens": self.work.new_tokens, "max_new_tokens": self.work.new_tokens}
        start = self._clock()
        self.model.generate(**self.inputs, do_sample=False, **length)
        seconds["end_to_end"] = self._clock() - start
        measured.peak_memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        return seconds

    @torch.inference_mode()
    def _bound(self) -> float:
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
    """What the model's processor would give for one image and some text per sample; pixels and words are random.

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


def _cache_bytes(cache: Any) -> list[int]:
    """Bytes of keys and values of each layer of a KV cache, from the tensors themselves."""
    return [
        sum(tensor.numel() * tensor.element_size() for tensor in (layer.keys, layer.values))
        for layer in cache.layers
    ]
