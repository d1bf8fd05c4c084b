"""The dense model's own greedy answers and next-token distributions: what every variant is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pmod_cli.calibration.routable import Routable
from pmod_cli.generation import generation_settings


@dataclass(frozen=True)
class Batch:
    """Some prompts with the dense model's answers behind them.

    Attributes:
        inputs: The model's, on its device but for the pixels: ids [batch, tokens], padded on the left.
        answer: Tokens of the answers, [batch, longest answer]; they stand at the end of the ids.
        asked: True for tokens of an answer, its end included, [batch, longest answer].
        logprobs: The dense model's, fp16 [answer tokens of all samples, vocabulary].
    """

    inputs: dict[str, Tensor]
    answer: Tensor
    asked: Tensor
    logprobs: Tensor

    @property
    def size(self) -> int:
        """Samples."""
        return len(self.answer)

    def on(self, model: Any) -> dict[str, Tensor]:
        """The inputs on the model's device, pixels in its dtype."""
        return {
            name: value.to(model.device, model.dtype if value.is_floating_point() else None)
            for name, value in self.inputs.items()
        }


def answer_logprobs(model: Any, batch: Batch) -> Tensor:
    """Log-probabilities of the next token at each token of the answers, fp32 [answer tokens, vocabulary]."""
    longest = batch.answer.shape[1]
    logits = model(**batch.on(model), use_cache=False, logits_to_keep=longest + 1).logits
    return logits[:, :-1][batch.asked].float().log_softmax(-1)


def answered(
    routable: Routable,
    inputs: dict[str, Tensor],
    pad: int,
    max_new_tokens: int,
    known: Tensor | None = None,
) -> Batch:
    """Let the dense model answer a batch of prompts, padded on the left.

    Args:
        routable: The model.
        inputs: What the processor gives.
        pad: Id of padding.
        max_new_tokens: Longest answer.
        known: The answers, [batch, longest answer], if it has given them before.
    """
    with routable.dense() as model:
        empty = torch.empty(0, device=model.device)
        ids = inputs["input_ids"].to(model.device)
        names = ("image_token_id", "video_token_id")
        placeholders = [token for name in names if (token := getattr(model.config, name, None)) is not None]
        if known is None:
            output = model.generate(
                **Batch(inputs, empty, empty, empty).on(model),
                **generation_settings({"max_new_tokens": max_new_tokens}),
                pad_token_id=pad,
                suppress_tokens=placeholders,  # in an answer, which is read again, they would ask for pictures
            )
            known = output[:, ids.shape[1] :]
        answer = known.to(ids.device)
        ends = model.generation_config.eos_token_id
        ended = torch.isin(answer, torch.as_tensor([] if ends is None else ends, device=ids.device)).int()
        asked = ended.cumsum(1) - ended == 0
        longest = int(asked.sum(1).max())
        answer, asked = answer[:, :longest], asked[:, :longest]
        # Of what else has one entry per token (e.g. token types) answers have 0.
        whole = {
            name: functional.pad(value, (0, longest)) if value.shape == ids.shape else value
            for name, value in inputs.items()
        }
        whole["input_ids"] = torch.cat([ids, answer], dim=1)
        whole["attention_mask"] = torch.cat([inputs["attention_mask"].to(ids.device), asked.long()], dim=1)
        batch = Batch(whole, answer, asked, empty)
        return Batch(whole, answer, asked, answer_logprobs(model, batch).half())
