"""How much memory a run will take on each device, and what to do if that is more than there is.

Weights, gradients and optimizer state are counted exactly; activations are those of a micro batch of the
longest samples, from the shapes that a Llama-like decoder keeps for its backward pass.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from pmod_cli.devices import local_world_size
from pmod_cli.modeling.schedule import Ratios, mean_retention
from pmod_cli.recipe import LoraSettings, TrainSettings
from pmod_cli.training.model import LORA_TARGETS

_RESERVE = 0.92
"""Share of a device that a run may plan to fill: kernels, communication and fragments take the rest."""


@dataclass(frozen=True)
class Workload:
    """What decides a run's memory: a model and its longest sample.

    Attributes:
        trained: Trained parameters.
        frozen: Frozen parameters.
        lora_trained: What would be trained with LoRA at its default rank, as in the recipe ``lora-24gb``.
        layers: Decoder layers.
        hidden: Width of the residual stream.
        intermediate: Width of the MLP.
        kv_width: Width of the keys, and of the values.
        vocabulary: Rows of the output head.
        retention: Retention ratios of the decoder layers; all None for a dense model.
        tokens: Tokens of the longest sample, pictures included.
        vision_tokens: How many of these are the pictures'.
    """

    trained: int
    frozen: int
    lora_trained: int
    layers: int
    hidden: int
    intermediate: int
    kv_width: int
    vocabulary: int
    retention: Ratios
    tokens: int
    vision_tokens: int


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each device.

    Attributes:
        weights: Parameters.
        gradients: Gradients of the trained parameters.
        optimizer: Adam's moments, and float32 copies where weights are held in half precision.
        activations: Activations of one micro batch.
        available: The device's memory; None if not known.
        advice: What would make it fit, each with its own estimate; empty if it fits.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    available: int | None
    advice: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """The sum."""
        return self.weights + self.gradients + self.optimizer + self.activations

    @property
    def fits(self) -> bool:
        """Whether the device has as much, with a reserve."""
        return self.available is None or self.total <= _RESERVE * self.available

    def to_dict(self) -> dict[str, Any]:
        """Everything, in what JSON can write."""
        return {**asdict(self), "total": self.total, "fits": self.fits}

    def to_text(self) -> str:
        """The amounts in one line, and a line for each piece of advice."""
        names = ("weights", "gradients", "optimizer", "activations")
        amounts = ", ".join(f"{name} {gib(getattr(self, name))}" for name in names)
        available = "" if self.available is None else f" of {gib(self.available)}"
        lines = [f"memory per device, at most about {gib(self.total)}{available}: {amounts}"]
        if not self.fits:
            lines.append("that will not fit; what would lower it, each on top of the ones before:")
        return "\n  ".join([*lines, *self.advice])


def gib(amount: float) -> str:
    """Bytes in GiB, as the memory of devices is given."""
    return f"{amount / 2**30:.2f} GiB"


def describe(network: nn.Module, tokens: int, vision_tokens: int) -> Workload:
    """Describe a model and its longest sample.

    Args:
        network: As it will be trained (frozen parts frozen, LoRA added).
        tokens: Tokens of the longest sample, pictures included.
        vision_tokens: How many of these are the pictures'.
    """
    config: Any = network.config
    text = config.text_config
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in network.parameters())
    rank = LoraSettings().r
    lora = sum(
        rank * (module.in_features + module.out_features)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and re.fullmatch(LORA_TARGETS, name)
    )
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    mod = getattr(config, "mod", None)
    return Workload(
        trained=trained,
        frozen=everything - trained,
        lora_trained=lora,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        kv_width=(getattr(text, "num_key_value_heads", None) or heads) * head_dim,
        vocabulary=text.vocab_size,
        retention=config.mod_config.retention_ratios if mod else [None] * text.num_hidden_layers,
        tokens=tokens,
        vision_tokens=vision_tokens,
    )


def estimate(
    work: Workload, settings: TrainSettings, world: int, shards: str | None, available: int | None
) -> MemoryEstimate:
    """Estimate a run's memory on each device, with advice if it does not fit.

    Args:
        work: See `describe`.
        settings: The recipe's.
        world: Processes.
        shards: ``fsdp``, ``zero1``, ``zero2``, ``zero3`` or None.
        available: The device's memory in bytes, or None.
    """
    result = _estimate(work, settings, world, shards, available)
    if result.fits:
        return result
    advice = []
    for change, changed in _changes(work, settings, world, shards):
        option = _estimate(*changed, available)
        if option.total < result.total:
            advice.append(f"{change}: {gib(option.total)}{'' if option.fits else ' (still too much)'}")
    return replace(result, advice=advice)


def device_memory() -> int:
    """Bytes of this process's GPU, or its share of the machine's memory."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total // local_world_size()


def _estimate(
    work: Workload, settings: TrainSettings, world: int, shards: str | None, available: int | None
) -> MemoryEstimate:
    half = 2 if settings.dtype != "float32" else 4
    deepspeed = shards is not None and shards.startswith("zero")
    # DeepSpeed holds half-precision weights and float32 copies of them; else weights are float32.
    trained_size = half if deepspeed else 4
    frozen_size = half if deepspeed or settings.lora is not None else 4
    optimizer_size = 8 + (4 if deepspeed and half == 2 else 0)
    split_optimizer = world if shards is not None else 1
    split_gradients = world if shards in ("fsdp", "zero2", "zero3") else 1
    split_weights = world if shards in ("fsdp", "zero3") else 1
    weights = (work.trained * trained_size + work.frozen * frozen_size) // split_weights
    activations = settings.micro_batch_size * _activations(work, settings, half)
    if half == 2 and not deepspeed:
        # Autocast keeps half-precision copies of the weights that it has met in this pass; FSDP of a layer.
        activations += 2 * work.trained // (work.layers if shards == "fsdp" else 1)
    return MemoryEstimate(
        weights=weights,
        gradients=work.trained * trained_size // split_gradients,
        optimizer=work.trained * optimizer_size // split_optimizer,
        activations=activations,
        available=available,
    )


def _activations(work: Workload, settings: TrainSettings, size: int) -> int:
    """Bytes of one sample, kept for the backward pass."""
    hidden, kv = work.hidden, work.kv_width
    # Two norms (with float32 copies where the residual stream is in half precision), plain and rotated queries
    # and keys, values, what attention and projections give, and the MLP's four.
    norms = (16 if size == 2 else 8) * hidden
    layer = norms + size * (7 * hidden + 4 * kv + 4 * work.intermediate)
    text = work.tokens - work.vision_tokens
    kept = text + mean_retention(work.retention) * work.vision_tokens
    if settings.gradient_checkpointing:
        decoder: float = work.layers * work.tokens * hidden * size + work.tokens * layer
    else:
        decoder = work.layers * kept * layer
    # Logits, their float32 copy and its gradient, from the first answer on.
    head = text * work.vocabulary * (size + 8)
    return int(decoder + head)


def _changes(
    work: Workload, settings: TrainSettings, world: int, shards: str | None
) -> Iterator[tuple[str, tuple[Workload, TrainSettings, int, str | None]]]:
    """Changes that lower the memory, each on top of those before it: what to do, and the new arguments."""
    for name, value in (("gradient_checkpointing", True), ("micro_batch_size", 1)):
        if getattr(settings, name) != value:
            settings = settings.model_copy(update={name: value})
            yield f"train.{name}={str(value).lower()}", (work, settings, world, shards)
    if world == 1:
        yield "8 devices with recipes/accelerate/zero3.yaml", (work, settings, 8, "zero3")
    elif shards not in ("fsdp", "zero3"):
        yield "recipes/accelerate/zero3.yaml", (work, settings, world, "zero3")
    if settings.lora is None:
        smaller = replace(work, trained=work.lora_trained, frozen=work.trained + work.frozen)
        settings = settings.model_copy(update={"lora": LoraSettings(), "dtype": "bfloat16"})
        yield "LoRA as in the recipe lora-24gb", (smaller, settings, world, shards)
