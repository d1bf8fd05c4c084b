"""What ends an answer before its last token: a stop string, or logits that are not numbers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import LogitsProcessor, StoppingCriteria

from pmod_cli.output.errors import PmodError


class Numbers(LogitsProcessor):
    """Refuses an answer's first logits if they are not numbers: an empty answer, or any, could come of them."""

    checked = False

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """The scores as they are, [batch, vocabulary]; a `PmodError` if they are none."""
        if not self.checked and bool(scores.isnan().any()):
            raise PmodError(
                "the model computes what is not a number (NaN)",
                "its weights are damaged, or too large for the dtype",
            )
        self.checked = True
        return scores


class StopStrings(StoppingCriteria):
    """Ends each row of a batch at the first stop string after the white space that its answer begins with.

    ``shape`` is that of the prompts' tokens. ``ends`` is the number of new tokens by row, of rows that have ended.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str], shape: Sequence[int]) -> None:
        self.tokenizer, self.strings = tokenizer, strings
        self.start = shape[1]
        # A token is a byte at least, but for special ones; white space at its beginning can be lost in decoding.
        self.tail = max((len(string.encode()) for string in strings), default=0) + 4
        self.ends: dict[int, int] = {}

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> Any:
        """Which rows have ended, [batch]."""
        new = input_ids[:, self.start :].cpu()
        decode = partial(self.tokenizer.decode, skip_special_tokens=True)
        for row, ids in enumerate(new):
            # The whole answer is decoded only where its end has a stop string.
            if row in self.ends or not self._in(decode(ids[-self.tail :])):
                continue
            if self._in(decode(ids).lstrip()):
                self.ends[row] = new.shape[1]
        return torch.tensor([row in self.ends for row in range(len(new))], device=input_ids.device)

    def _in(self, text: str) -> bool:
        return any(string in text for string in self.strings)
