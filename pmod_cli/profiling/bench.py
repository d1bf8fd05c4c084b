"""One model and one prompt, ready to be timed: prefill, decode, ``generate``, and the kept-tokens-only bound."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pmod_cli.profiling.paths import CACHE_ARGUMENT, cache_bytes, cache_lengths
from pmod_cli.profiling.prompt import Workload


@dataclass(frozen=True)
class Turn:
    """What one turn of a model gave.

    Attributes:
        seconds: By phase: ``prefill``, ``decode`` (if more than one token is generated), ``end_to_end``.
        kv_prefill: Bytes of KV cache by layer after the prompt.
        kv_final: Bytes of KV cache by layer when the last token was generated.
        peak_memory: Most bytes allocated on the device; None on a CPU.
    """

    seconds: dict[str, float]
    kv_prefill: list[int]
    kv_final: list[int]
    peak_memory: int | None


class Bench:
    """One model with one prompt."""

    def __init__(self, model: Any, work: Workload) -> None:
        self.model, self.work = model, work
        self.inputs = make_inputs(model, work)
        self.kept: list[int] = []

    @torch.inference_mode()
    def run(self) -> Turn:
        """One prefill, the decode steps after it, and one ``generate``."""
        device = self.model.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        gc.collect()
        start = self._clock()
        output = self.model(**self.inputs, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1:].argmax(-1)
        seconds = {"prefill": self._clock() - start}
        cache = output[CACHE_ARGUMENT]
        self.kept = cache_lengths(cache)
        kv_prefill = cache_bytes(cache)
        if self.work.new_tokens > 1:
            start = self._clock()
            for _ in range(self.work.new_tokens - 1):
                step = {CACHE_ARGUMENT: cache, "use_cache": True, "logits_to_keep": 1}
                token = self.model(input_ids=token, **step).logits[:, -1:].argmax(-1)
            seconds["decode"] = self._clock() - start
        kv_final = cache_bytes(cache)
        del cache, output
        length = {"min_new_tokens": self.work.new_tokens, "max_new_tokens": self.work.new_tokens}
        start = self._clock()
        self.model.generate(**self.inputs, do_sample=False, **length)
        seconds["end_to_end"] = self._clock() - start
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        return Turn(seconds, kv_prefill, kv_final, peak)

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
