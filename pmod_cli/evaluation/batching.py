"""Many prompts, answered in left-padded batches of similar length and of a size that fits."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from pmod_cli.generation import Answer, Prompt, VisionLanguageModel

logger = logging.getLogger(__name__)

BatchSetting = int | Literal["auto"]
Outcome = Answer | Exception

_WINDOW = 8  # batches whose pictures are in memory at once, to be sorted by their real length


@dataclass(frozen=True)
class Question:
    """A prompt that is still to be made: pictures are decoded only when their turn comes.

    Attributes:
        text: Its text, for sorting.
        make: Makes the prompt; may raise.
    """

    text: str
    make: Callable[[], Prompt]


class BatchSizer:
    """How many prompts go into a batch.

    With ``auto`` the size doubles after each full batch that fitted, until one runs out of memory; from then on it
    is the largest that did fit. Out of memory halves it, whether it was ``auto`` or given.

    Args:
        setting: A number, or ``auto``.
        device: Where the model is: a CPU gains little from large batches, so ``auto`` stops earlier there.
    """

    def __init__(self, setting: BatchSetting, device: torch.device | str = "cpu") -> None:
        if setting != "auto" and setting < 1:
            raise ValueError(f"a batch needs at least 1 sample, not {setting}")
        self.size: int = 4 if setting == "auto" else setting
        self.largest = 0
        self.out_of_memory = 0
        self._ceiling = (
            (128 if torch.device(device).type == "cuda" else 16) if setting == "auto" else self.size
        )

    def fitted(self, size: int) -> None:
        """A batch of ``size`` went through."""
        self.largest = max(self.largest, size)
        if size >= self.size:
            self.size = min(self.size * 2, self._ceiling)

    def overflowed(self, size: int) -> bool:
        """A batch of ``size`` ran out of memory: step down.

        Returns:
            False if there is no smaller batch.
        """
        self.out_of_memory += 1
        if size == 1:
            return False
        self.size = self._ceiling = min(self.size, size // 2)
        logger.warning("out of memory with a batch of %d; going on with %d", size, self.size)
        return True


def parse_batch_size(value: str | int) -> BatchSetting:
    """Read a batch size as it comes from a command line.

    Raises:
        ValueError: If it is neither a positive number nor ``auto``.
    """
    if str(value) == "auto":
        return "auto"
    size = int(value)
    if size < 1:
        raise ValueError(f"a batch needs at least 1 sample, not {size}")
    return size


def answer_all(
    model: VisionLanguageModel, questions: Sequence[Question], settings: Mapping[str, Any], sizer: BatchSizer
) -> Iterator[dict[int, Outcome]]:
    """Answer questions in an order and in batches that waste little.

    Args:
        model: The model.
        questions: The questions.
        settings: Generation settings.
        sizer: The batch size, kept from call to call.

    Yields:
        After each batch, what came of it by the question's index: an answer, or what it raised. Every index appears
        exactly once.
    """
    # Longest first: if memory runs out it does so at the start.
    waiting = sorted(range(len(questions)), key=lambda index: -len(questions[index].text))
    while waiting:
        window, waiting = waiting[: sizer.size * _WINDOW], waiting[sizer.size * _WINDOW :]
        prompts: dict[int, Prompt] = {}
        lengths: dict[int, int] = {}
        failed: dict[int, Outcome] = {}
        for index in window:
            try:
                prompt = questions[index].make()
                lengths[index] = model.length(prompt)
                prompts[index] = prompt
            except Exception as error:
                failed[index] = error
        if failed:
            yield failed
        ready = sorted(prompts, key=lambda index: -lengths[index])
        while ready:
            batch = ready[: sizer.size]
            outcomes = _answer_batch(model, [prompts[index] for index in batch], settings, sizer)
            if outcomes is not None:
                ready = ready[len(batch) :]
                yield dict(zip(batch, outcomes, strict=True))


def _answer_batch(
    model: VisionLanguageModel, prompts: list[Prompt], settings: Mapping[str, Any], sizer: BatchSizer
) -> Sequence[Outcome] | None:
    """Answer one batch; None if it has to be tried again with the sizer's new size."""
    try:
        answers = model.generate(prompts, **settings)
    except Exception as error:
        if not _is_out_of_memory(error):
            if len(prompts) == 1:
                return [error]
            # One of them is to blame: find out which, and let the others have their answers.
            return [_answer_alone(model, prompt, settings) for prompt in prompts]
        if not sizer.overflowed(len(prompts)):
            return [error]
    else:
        sizer.fitted(len(prompts))
        return answers
    # Outside of the handler, where the failed batch's tensors are no longer held by the traceback.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _answer_alone(model: VisionLanguageModel, prompt: Prompt, settings: Mapping[str, Any]) -> Outcome:
    try:
        return model.generate([prompt], **settings)[0]
    except Exception as error:
        return error


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch's CPU allocator
