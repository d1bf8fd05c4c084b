"""How much memory a run will take on each device, and what to do if that is more than there is.

Weights, gradients and optimizer state are counted exactly; activations are those of a micro batch of the
longest samples, from the shapes that a Llama-like decoder keeps for its backward pass.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
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
    """What decides a run's memory: a model, in parameters and widths, and its longest sample, in tokens.

    Attributes:
        lora_trained: What would be trained with LoRA at its default rank, as in the recipe ``lora-24gb``.
        hidden: Width of the residual stream.
        intermediate: Width of the MLP.
        kv_width: Width of the keys, and of the values.
        heads: Of the attention.
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
    heads: int
    vocabulary: int
    retention: Ratios
    tokens: int
    vision_tokens: int


def describe(network: nn.Module, tokens: int, vision_tokens: int) -> Workload:
    """Describe a model as it will be trained (frozen parts frozen, LoRA added), and its longest sample."""
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
        heads=heads,
        vocabulary=text.vocab_size,
        retention=config.mod_config.retention_ratios if mod else [None] * text.num_hidden_layers,
        tokens=tokens,
        vision_tokens=vision_tokens,
    )


def device_memory() -> int:
    """Bytes of this process's GPU, or its share of the machine's memory."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total // local_world_size()


def estimate(
    work: Workload, settings: TrainSettings, world: int, shards: str | None, available: int | None
) -> dict[str, Any]:
    """Estimate a run's memory on each of ``world`` devices, which may have ``available`` bytes.

    ``shards`` is ``fsdp``, ``zero1``, ``zero2``, ``zero3`` or None.

    Returns:
        Bytes of ``weights``, ``gradients`` (of the trained parameters), ``optimizer`` (Adam's moments, and float32
        copies where weights are held in half precision), ``activations`` (of one micro batch) and their ``total``;
        ``available``; ``fits``: whether the device has as much, with a reserve; and ``advice``: what would make it
        fit, each on top of the ones before and with its own estimate.
    """
    result = _estimate(work, settings, world, shards, available)
    result["advice"] = []
    if result["fits"]:
        return result

    def advise(change: str) -> None:
        option = _estimate(work, settings, world, shards, available)
        if option["total"] < result["total"]:
            still = "" if option["fits"] else " (still too much)"
            result["advice"].append(f"{change}: {gib(option['total'])}{still}")

    for name, value in (("gradient_checkpointing", True), ("micro_batch_size", 1)):
        if getattr(settings, name) != value:
            settings = settings.model_copy(update={name: value})
            advise(f"train.{name}={str(value).lower()}")
    own = world, shards
    if world == 1:
        world, shards = 8, "zero3"
        advise("8 devices with recipes/accelerate/zero3.yaml")
    elif shards not in ("fsdp", "zero3"):
        shards = "zero3"
        advise("recipes/accelerate/zero3.yaml")
    if settings.lora is None:
        world, shards = own
        work = replace(work, trained=work.lora_trained, frozen=work.trained + work.frozen)
        settings = settings.model_copy(update={"lora": LoraSettings(), "dtype": "bfloat16"})
        advise("LoRA as in the recipe lora-24gb")
    return result


def frozen_bytes(settings: TrainSettings) -> int:
    """Bytes that a frozen weight takes: where the whole backbone is frozen, those of ``train.dtype``."""
    return _size(settings) if settings.backbone_frozen else 4


def _size(settings: TrainSettings) -> int:
    return 4 if settings.dtype == "float32" else 2


def _estimate(
    work: Workload, settings: TrainSettings, world: int, shards: str | None, available: int | None
) -> dict[str, Any]:
    half = _size(settings)
    deepspeed = shards is not None and shards.startswith("zero")
    # DeepSpeed holds half-precision weights and float32 copies of them; else weights are float32.
    trained_size = half if deepspeed else 4
    frozen_size = half if deepspeed else frozen_bytes(settings)
    optimizer_size = 8 + (4 if deepspeed and half == 2 else 0)
    split_optimizer = world if shards is not None else 1
    split_gradients = world if shards in ("fsdp", "zero2", "zero3") else 1
    split_weights = world if shards in ("fsdp", "zero3") else 1
    activations = settings.micro_batch_size * _activations(work, settings, half)
    if half == 2 and not deepspeed:
        # Autocast keeps half-precision copies of the weights that it has met in this pass; FSDP of a layer.
        activations += 2 * work.trained // (work.layers if shards == "fsdp" else 1)
    amounts = {
        "weights": (work.trained * trained_size + work.frozen * frozen_size) // split_weights,
        "gradients": work.trained * trained_size // split_gradients,
        "optimizer": work.trained * optimizer_size // split_optimizer,
        "activations": activations,
    }
    total = sum(amounts.values())
    fits = available is None or total <= _RESERVE * available
    return {**amounts, "total": total, "available": available, "fits": fits}


def _activations(work: Workload, settings: TrainSettings, size: int) -> int:
    """Bytes of one sample, kept for the backward pass."""
    hidden, kv = work.hidden, work.kv_width
    # Two norms (with float32 copies where the residual stream is in half precision), plain and rotated queries
    # and keys, values, what attention and projections give, and the MLP's four.
    norms = (16 if size == 2 else 8) * hidden
    layer = norms + size * (7 * hidden + 4 * kv + 4 * work.intermediate)
    if settings.lora is not None:
        # Of each of the seven linear layers what dropout leaves of its input, with the mask, and the narrow middle.
        dropped = (size + 1 if settings.lora.dropout else 0) * (6 * hidden + work.intermediate)
        layer += dropped + 7 * settings.lora.r * size
    text = work.tokens - work.vision_tokens
    kept = text + mean_retention(work.retention) * work.vision_tokens
    if settings.learns_choice:
        # All tokens are computed, and attention keeps its scores: three in fp32, one in the model's format.
        kept = work.tokens
        layer += work.heads * work.tokens * (12 + size)
    if settings.gradient_checkpointing:
        decoder: float = work.layers * work.tokens * hidden * size + work.tokens * layer
    else:
        decoder = work.layers * kept * layer
    # Logits, their float32 copy and its gradient, from the first answer on; to distil, the dense model's and both
    # models' log-probabilities too.
    head = text * work.vocabulary * (size + 8 + (12 if settings.distill else 0))
    return int(decoder + head)


def memory_text(memory: dict[str, Any]) -> str:
    """An estimate: the amounts in one line, and a line for each piece of advice."""
    names = ("weights", "gradients", "optimizer", "activations")
    amounts = ", ".join(f"{name} {gib(memory[name])}" for name in names)
    available = "" if memory["available"] is None else f" of {gib(memory['available'])}"
    lines = [f"memory per device, at most about {gib(memory['total'])}{available}: {amounts}"]
    if not memory["fits"]:
        lines.append("that will not fit; what would lower it, each on top of the ones before:")
    return "\n  ".join([*lines, *memory["advice"]])


def gib(amount: float) -> str:
    """Bytes in GiB, as the memory of devices is given."""
    return f"{amount / 2**30:.2f} GiB"
