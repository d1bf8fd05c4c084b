"""Many prompts, answered in left-padded batches of similar length and of a size that fits."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch

from pmod_cli.generation import Answer, VisionLanguageModel
from pmod_cli.output.errors import is_out_of_memory
from pmod_cli.prompts import Prompt

logger = logging.getLogger(__name__)

Outcome = Answer | Exception

_WINDOW = 8  # batches whose pictures are in memory at once, to be sorted by their real length
_HELD_BYTES = 2 << 30  # of pictures and videos at once


class Question(NamedTuple):
    """A prompt that is still to be made: pictures are decoded only when their turn comes, and may raise."""

    text: str
    make: Callable[[], Prompt]


def parse_batch_size(value: str | int) -> int | Literal["auto"]:
    """Read a batch size as it comes from a command line.

    Raises:
        ValueError: If it is neither a positive number nor ``auto``.
    """
    if value == "auto":
        return "auto"
    size = int(value)
    if size < 1:
        raise ValueError(f"a batch needs at least 1 sample, not {size}")
    return size


class BatchSizer:
    """How many prompts go into a batch.

    With ``auto`` the size doubles after each full batch that fitted, until one runs out of memory; the largest that
    fits is then found between the two, to an eighth. A given size stays what it is. Either way, out of memory steps
    down.

    Args:
        setting: A number, or ``auto``.
        device: Where the model is: a CPU gains little from large batches, so ``auto`` stops earlier there.

    Attributes:
        size: The next batch's size.
        largest: Of the batches that went through.
        out_of_memory: How often a batch did not fit.
    """

    def __init__(self, setting: str | int, device: torch.device | str = "cpu") -> None:
        given = parse_batch_size(setting)
        self._auto = given == "auto"
        self.size, self._ceiling = (4, 16) if given == "auto" else (given, given)
        if self._auto and torch.device(device).type == "cuda":
            self._ceiling = 128
        self.largest = self.out_of_memory = 0
        self._too_large: int | None = None

    def fitted(self, size: int) -> None:
        """A batch of ``size`` went through: try a larger one if ``auto`` has room."""
        self.largest = max(self.largest, size)
        if size < self.size:
            return
        if self._too_large is None:
            self.size = min(self.size * 2, self._ceiling)
        elif self._auto and self._too_large - self.size > max(1, self.size // 8):
            self.size = (self.size + self._too_large) // 2

    def overflowed(self, size: int) -> bool:
        """A batch of ``size`` ran out of memory: step down. False if there is no smaller batch."""
        self.out_of_memory += 1
        if size == 1:
            return False
        self._too_large = size
        # What fitted before, unless that was for shorter prompts.
        self.size = self.largest if size // 2 <= self.largest < size else size // 2
        logger.warning("out of memory with a batch of %d; going on with %d", size, self.size)
        return True


def answer_all(
    model: VisionLanguageModel, questions: Sequence[Question], settings: Mapping[str, Any], sizer: BatchSizer
) -> Iterator[dict[int, Outcome]]:
    """Answer questions in an order and in batches that waste little; ``sizer`` is kept from call to call.

    Yields:
        After each batch, what came of it by the question's index: an answer, or what it raised. Every index appears
        exactly once.
    """
    # Longest first: if memory runs out it does so at the start.
    waiting = sorted(range(len(questions)), key=lambda index: (len(questions[index].text), -index))
    while waiting:
        ready: list[tuple[int, int, Prompt]] = []
        failed: dict[int, Outcome] = {}
        held = 0
        while waiting and len(ready) < sizer.size * _WINDOW and held < _HELD_BYTES:
            index = waiting.pop()
            try:
                prompt = questions[index].make()
                ready.append((model.length(prompt), index, prompt))
                held += prompt.nbytes
            except Exception as error:
                failed[index] = error
        if failed:
            yield failed
        ready.sort(key=lambda entry: -entry[0])
        while ready:
            batch = ready[: sizer.size]
            outcomes = _answer_batch(model, [prompt for _, _, prompt in batch], settings, sizer)
            if outcomes is not None:
                ready = ready[len(batch) :]
                yield {index: outcome for (_, index, _), outcome in zip(batch, outcomes, strict=True)}


def _answer_batch(
    model: VisionLanguageModel, prompts: list[Prompt], settings: Mapping[str, Any], sizer: BatchSizer
) -> Sequence[Outcome] | None:
    """Answer one batch; None if it has to be tried again with the sizer's new size."""
    try:
        answers = model.generate(prompts, **settings)
        sizer.fitted(len(prompts))
        return answers
    except Exception as error:
        if not is_out_of_memory(error):
            if len(prompts) == 1:
                return [error]
            # One of them is to blame: find out which, and let the others have their answers.
            alone = (_answer_batch(model, [prompt], settings, sizer) for prompt in prompts)
            return [outcome for outcomes in alone for outcome in outcomes or ()]
        if not sizer.overflowed(len(prompts)):
            return [error]
    # Outside of the handler, where the failed batch's tensors are no longer held by the traceback.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None
