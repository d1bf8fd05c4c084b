"""Many prompts, answered in left-padded batches of similar length and of a size that fits."""

from __future__ import annotations

import gc
import logging
import time
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
        widest: The prompts and settings of the largest batch that went through; kept with ``auto``.
    """

    def __init__(self, setting: BatchSetting, device: torch.device | str = "cpu") -> None:
        if setting != "auto" and setting < 1:
            raise ValueError(f"a batch needs at least 1 sample, not {setting}")
        self.auto = setting == "auto"
        self.size: int = 4 if setting == "auto" else setting
        self.largest = 0
        self.out_of_memory = 0
        self.widest: tuple[Sequence[Prompt], Mapping[str, Any]] = ((), {})
        self._ceiling = (
            (128 if torch.device(device).type == "cuda" else 16) if setting == "auto" else self.size
        )
        self._too_large: int | None = None

    def fitted(self, prompts: Sequence[Prompt], settings: Mapping[str, Any]) -> None:
        """A batch went through: try a larger one if ``auto`` has room."""
        size = len(prompts)
        if size > self.largest:
            self.largest = size
            if self.auto:
                self.widest = (prompts, settings)
        if size < self.size:
            return
        if self._too_large is None:
            self.size = min(self.size * 2, self._ceiling)
        elif self.auto and self._too_large - self.size > max(1, self.size // 8):
            self.size = (self.size + self._too_large) // 2

    def overflowed(self, size: int) -> bool:
        """A batch of ``size`` ran out of memory: step down.

        Returns:
            False if there is no smaller batch.
        """
        self.out_of_memory += 1
        if size == 1:
            return False
        self._too_large = size
        # What fitted before, unless that was for shorter prompts.
        self.size = self.largest if size // 2 <= self.largest < size else size // 2
        logger.warning("out of memory with a batch of %d; going on with %d", size, self.size)
        return True


@dataclass(frozen=True)
class Gain:
    """What batches are worth, measured on a batch's own samples.

    Attributes:
        batch: Samples in the batch.
        batched: Samples a second, all together.
        alone: Samples a second, one at a time.
        timed_alone: How many of them were timed alone.
    """

    batch: int
    batched: float
    alone: float
    timed_alone: int

    @property
    def factor(self) -> float:
        """How many times as fast the batch is."""
        return self.batched / self.alone


def measure_gain(model: VisionLanguageModel, sizer: BatchSizer, alone: int = 4) -> Gain | None:
    """Answer the largest batch once more, and some of its samples one at a time.

    Args:
        model: The model, warm.
        sizer: Knows the largest batch.
        alone: How many to answer alone; they are spread evenly over the batch, which is sorted by length.

    Returns:
        None if there was no batch of two.
    """
    prompts, settings = sizer.widest
    if len(prompts) < 2:
        return None
    picked = (
        [prompts[index * len(prompts) // alone] for index in range(alone)]
        if alone < len(prompts)
        else prompts
    )
    together = _seconds(model, [prompts], settings)
    apart = _seconds(model, [[prompt] for prompt in picked], settings)
    return Gain(len(prompts), len(prompts) / together, len(picked) / apart, len(picked))


def _seconds(
    model: VisionLanguageModel, batches: Sequence[Sequence[Prompt]], settings: Mapping[str, Any]
) -> float:
    started = time.perf_counter()
    for batch in batches:
        model.generate(batch, **settings)  # ends with its answers as text, so a GPU has nothing left to do
    return time.perf_counter() - started


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
        sizer.fitted(prompts, settings)
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
