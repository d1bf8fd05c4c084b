"""Distillation without a second model: the trained one, run dense and without what was trained, is the teacher."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pmod_cli.data.chat import IGNORED
from pmod_cli.modeling.layer import MoDDecoderLayer


@contextlib.contextmanager
def dense(network: Any) -> Iterator[None]:
    """Every layer of a p-MoD model runs dense while the block runs, and PEFT's adapters are off."""
    layers = [layer for layer in network.modules() if isinstance(layer, MoDDecoderLayer)]
    ratios = [layer.retention_ratio for layer in layers]  # a warm-up changes them
    with network.disable_adapter() if hasattr(network, "disable_adapter") else contextlib.nullcontext():
        for layer in layers:
            layer.retention_ratio = None
        try:
            yield
        finally:
            for layer, ratio in zip(layers, ratios, strict=True):
                layer.retention_ratio = ratio


def answer_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities of the tokens that the loss is about, [labelled tokens, vocabulary], in fp32.

    Args:
        logits: [batch, tokens, vocabulary].
        labels: Of the same tokens, `IGNORED` where there is no loss, [batch, tokens].
    """
    return logits[:, :-1][labels[:, 1:] != IGNORED].float().log_softmax(-1)


def teacher_logprobs(model: nn.Module, network: Any, inputs: dict[str, Any]) -> Tensor:
    """What the dense model says of a batch, see `answer_logprobs`.

    Args:
        model: What the trainer calls, around the network.
        network: The p-MoD model, or the PEFT model around it.
        inputs: A batch with its ``labels``.
    """
    given = {name: value for name, value in inputs.items() if name != "labels"}
    with dense(network), torch.no_grad():
        return answer_logprobs(model(**given, use_cache=False).logits, inputs["labels"])


def divergence(teacher: Tensor, student: Tensor, count: Tensor | int | None) -> Tensor:
    """KL divergence of the student's distributions from the teacher's, the sum over ``count`` or the mean, in nats."""
    total = F.kl_div(student, teacher, reduction="sum", log_target=True)
    return total / (len(teacher) if count is None else count)
