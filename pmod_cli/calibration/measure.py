"""How far a routed model is from the same model run dense, sample by sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pmod_cli.calibration.reference import Batch, answer_logprobs
from pmod_cli.calibration.routable import Ratios, Routable
from pmod_cli.calibration.selection import Selection


@dataclass(frozen=True)
class Outcome:
    """By sample.

    Attributes:
        divergence: KL divergence of the next-token distribution from the dense model's, mean over the answer, in nats.
        agreement: 1 where the greedy answer is the dense model's, to the last token, else 0.
    """

    divergence: np.ndarray
    agreement: np.ndarray


def measure(routable: Routable, batches: Sequence[Batch], ratios: Ratios, selection: Selection) -> Outcome:
    """Run a variant over the dense model's answers.

    One pass tells both: which vision tokens are kept does not depend on what comes after them, so a greedy answer is
    the dense model's just where each of its tokens is the most likely one behind those before.

    Args:
        routable: The model.
        batches: Prompts with the dense model's answers.
        ratios: Retention ratio of each layer, None for a dense one.
        selection: What chooses the tokens; of one that is drawn, the mean over its draws.
    """
    with selection.on(routable, ratios) as model:
        return judge(model, batches, selection.draws)


def judge(model: Any, batches: Sequence[Batch], draws: int = 1) -> Outcome:
    """See `measure`: of a model as it is, the mean over so many passes; no gradients are wanted."""
    divergences, agreements = [], []
    for batch in batches:
        logprobs = [answer_logprobs(model, batch) for _ in range(draws)]
        each = [_compare(batch, drawn) for drawn in logprobs]
        divergences.append(torch.stack([divergence for divergence, _ in each]).mean(0).cpu())
        agreements.append(torch.stack([agreement for _, agreement in each]).mean(0).cpu())
    return Outcome(torch.cat(divergences).numpy(), torch.cat(agreements).numpy())


def _compare(batch: Batch, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Divergence and agreement of each sample, from what `answer_logprobs` gives."""
    dense = batch.logprobs.float()
    each = (dense.exp() * (dense - logprobs)).sum(-1)
    same = (logprobs.argmax(-1) == batch.answer[batch.asked]).float()
    counts = batch.asked.sum(1)
    sample = torch.arange(batch.size, device=counts.device).repeat_interleave(counts)
    nothing = torch.zeros(batch.size, device=counts.device)
    divergence = (nothing.index_add(0, sample, each) / counts).clamp(min=0)
    return divergence, (nothing.index_add(0, sample, same) == counts).float()
