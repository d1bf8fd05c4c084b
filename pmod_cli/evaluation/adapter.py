"""The model that lmms-eval knows as ``pmod``: any LLaVA checkpoint, dense or p-MoD, through the same code."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms

from pmod_cli.devices import own_device
from pmod_cli.evaluation.batching import BatchSizer, Question, answer_all
from pmod_cli.evaluation.blame import told
from pmod_cli.evaluation.identity import preparation, prompt_digest
from pmod_cli.evaluation.visuals import prompt_of
from pmod_cli.generation import Answer, VisionLanguageModel
from pmod_cli.prompts import Prompt

if TYPE_CHECKING:
    from pmod_cli.evaluation.folder import AnswerStore


class PmodLmms(lmms):
    """A checkpoint behind lmms-eval's model interface.

    Args:
        pretrained: Folder or hub id, or a model that is loaded already.
        batch_size: A number or ``auto``; lmms-eval passes it as a string.
        device: Where to put the model.
        max_new_tokens: Upper limit on a task's own ``max_new_tokens``.
        max_batch_size: Accepted because lmms-eval passes it; ``auto`` finds its own limit.
        raise_failures: Raise if a sample failed, once all have been tried. `pmod eval` collects them instead.
        options: Further ones of `VisionLanguageModel.load`.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str | VisionLanguageModel,
        batch_size: str | int = "auto",
        device: str | None = None,
        max_new_tokens: int | None = None,
        max_batch_size: int | None = None,
        raise_failures: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        if not isinstance(pretrained, VisionLanguageModel):
            pretrained = VisionLanguageModel.load(pretrained, device=own_device(device), **options)
        self.vlm = pretrained
        self.sizer = BatchSizer(batch_size, self.vlm.device)
        self.max_new_tokens = max_new_tokens
        self.raise_failures = raise_failures
        self.failures: dict[tuple[str, int], str] = {}
        self.store: AnswerStore | None = None
        self.on_answers: Callable[[int], None] = lambda number: None
        self.generated = self.recalled = 0
        self.seconds = 0.0

    @property
    def device(self) -> torch.device:
        """Where the model is; lmms-eval gathers counts from there."""
        return self.vlm.device

    def clean(self) -> None:
        """Keep the model: lmms-eval calls this after each ``evaluate`` and would delete it."""

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answer all requests; one that raises is recorded in ``failures``.

        Raises:
            RuntimeError: If any failed and ``raise_failures`` is set.
        """
        results: list[GenerationResult] = [GenerationResult("")] * len(requests)
        groups: dict[str, list[int]] = defaultdict(list)
        for position, request in enumerate(requests):
            # Padding only equalises the number of forward passes per process, which we don't need.
            if not request.metadata.get("__padding_only__"):
                groups[json.dumps(request.args[1], sort_keys=True, default=str)].append(position)
        for positions in groups.values():
            self._answer_group(requests, positions, results)
        if self.failures and self.raise_failures:
            (task, doc_id), error = next(iter(self.failures.items()))
            raise RuntimeError(f"{len(self.failures)} samples failed, the first is {task} {doc_id}: {error}")
        return results

    def _answer_group(
        self, requests: Sequence[Instance], positions: list[int], results: list[GenerationResult]
    ) -> None:
        """Answer requests that share their generation settings."""
        settings = dict(requests[positions[0]].args[1] or {})
        until = settings.get("until") or []
        if (most := self.max_new_tokens) is not None:
            settings["max_new_tokens"] = min(settings.get("max_new_tokens", most), most)
        asked: Counter[tuple[int, str]] = Counter()
        repeats: dict[int, int] = {}  # by position: how often the same was asked before
        keys: dict[int, str] = {}  # by position: what its answer is kept by
        for position in positions:
            text, _, _, doc_id, _, _ = requests[position].args
            repeats[position] = asked[doc_id, text]
            asked[doc_id, text] += 1

        def make(position: int) -> Prompt:
            prompt = self._prompt(*requests[position].args)
            keys[position] = prompt_digest(prompt, repeats[position])
            return prompt

        waiting = []
        for position in positions:
            doc_id = requests[position].args[3]
            if self.store is not None and self.store.knows(doc_id):
                with contextlib.suppress(Exception):  # it is made once more below, and its error recorded
                    make(position)
                    if known := self.store.get(doc_id, keys[position]):
                        results[position] = _finish(known, until)
                        continue
            waiting.append(position)
        self.recalled += len(positions) - len(waiting)
        self.on_answers(self.recalled + self.generated)
        questions = [Question(requests[position].args[0], partial(make, position)) for position in waiting]
        started = time.perf_counter()
        for batch in answer_all(self.vlm, questions, settings, self.sizer):
            answered = []
            for index, outcome in batch.items():
                _, _, _, doc_id, task, _ = requests[waiting[index]].args
                if isinstance(outcome, Answer):
                    answered.append((doc_id, keys[waiting[index]], outcome))
                    results[waiting[index]] = _finish(outcome, until)
                else:
                    self.failures[task, doc_id] = told(outcome)
            if self.store is not None:
                self.store.add(answered)
            self.generated += len(batch)
            self.on_answers(self.recalled + self.generated)
        self.seconds += time.perf_counter() - started

    def _prompt(
        self, text: str, _: Any, doc_to_visual: Callable[[Any], Any], doc_id: int, task: str, split: str
    ) -> Prompt:
        return prompt_of(text, doc_to_visual, self.task_dict[task][split][doc_id])

    def loglikelihood(self, requests: Sequence[Instance]) -> Any:
        """Not supported: the paper's tasks all generate, in one round."""
        raise NotImplementedError("pmod answers generate_until tasks only")

    generate_until_multi_round = loglikelihood

    def conditions(self) -> dict[str, Any]:
        """What an answer depends on besides checkpoint and prompt."""
        return {
            "dtype": str(self.vlm.model.dtype).removeprefix("torch."),
            "device": self.vlm.device.type,
            "attention": self.vlm.model.config._attn_implementation,
            "kernels": self.vlm.kernels,
            "cache": self.vlm.cache,
            "preparation": preparation(self.vlm.processor),
        }


def _finish(answer: Answer, until: str | Sequence[str]) -> GenerationResult:
    text = answer.text
    for stop in [until] if isinstance(until, str) else until:
        if stop:
            text = text.split(stop)[0]
    return GenerationResult(text.strip(), TokenCounts(answer.prompt_tokens, answer.new_tokens))
