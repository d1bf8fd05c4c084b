"""The model that lmms-eval knows as ``pmod``: any LLaVA checkpoint, dense or p-MoD, through the same code."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms

from pmod_cli.evaluation.batching import (
    BatchSizer,
    Gain,
    Outcome,
    Question,
    answer_all,
    measure_gain,
    parse_batch_size,
)
from pmod_cli.evaluation.identity import preparation
from pmod_cli.evaluation.processes import own_device
from pmod_cli.evaluation.store import AnswerStore
from pmod_cli.generation import IMAGE_BACKEND, Answer, Prompt, VisionLanguageModel


class PmodLmms(lmms):
    """A checkpoint behind lmms-eval's model interface.

    Args:
        pretrained: Folder or hub id, or a model that is loaded already.
        batch_size: A number or ``auto``; lmms-eval passes it as a string.
        device: Where to put the model.
        dtype: See `VisionLanguageModel.load`.
        attn_implementation: See `VisionLanguageModel.load`.
        image_backend: See `VisionLanguageModel.load`.
        max_new_tokens: Upper limit on a task's own ``max_new_tokens``.
        max_batch_size: Accepted because lmms-eval passes it; ``auto`` finds its own limit.
        raise_failures: Raise if a sample failed, once all have been tried. `pmod eval` collects them instead.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str | VisionLanguageModel,
        batch_size: str | int = "auto",
        device: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        image_backend: str = IMAGE_BACKEND,
        max_new_tokens: int | None = None,
        max_batch_size: int | None = None,
        raise_failures: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(pretrained, VisionLanguageModel):
            pretrained = VisionLanguageModel.load(
                pretrained,
                dtype=dtype,
                device=own_device(device),
                attn_implementation=attn_implementation,
                image_backend=image_backend,
            )
        self.vlm = pretrained
        self.sizer = BatchSizer(parse_batch_size(batch_size), self.vlm.device)
        self.max_new_tokens = max_new_tokens
        self.raise_failures = raise_failures
        self.failures: dict[tuple[str, int], str] = {}
        self.store: AnswerStore | None = None
        self.on_answers: Callable[[int], None] = lambda count: None
        self.generated = self.recalled = 0
        self.seconds = 0.0
        self.gain: Gain | None = None

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
        if self.max_new_tokens is not None:
            settings["max_new_tokens"] = min(
                settings.get("max_new_tokens", self.max_new_tokens), self.max_new_tokens
            )
        waiting = []
        for position in positions:
            known = self._recall(requests[position])
            if known is None:
                waiting.append(position)
            else:
                results[position] = self._finish(known, until)
        self.recalled += len(positions) - len(waiting)
        self.on_answers(len(positions) - len(waiting))
        questions = [self._question(requests[position]) for position in waiting]
        started = time.perf_counter()
        for batch in answer_all(self.vlm, questions, settings, self.sizer):
            done = {waiting[index]: outcome for index, outcome in batch.items()}
            self._record([(requests[position], outcome) for position, outcome in done.items()])
            for position, outcome in done.items():
                if isinstance(outcome, Answer):
                    results[position] = self._finish(outcome, until)
            self.generated += len(done)
            self.on_answers(len(done))
        self.seconds += time.perf_counter() - started

    def _question(self, request: Instance) -> Question:
        text, _, doc_to_visual, doc_id, task, split = request.args

        def make() -> Prompt:
            visuals = doc_to_visual(self.task_dict[task][split][doc_id]) or []
            return Prompt(text, tuple(visuals))

        return Question(text, make)

    def _recall(self, request: Instance) -> Answer | None:
        return self.store.get(request.args[3], request.args[0]) if self.store is not None else None

    def _record(self, outcomes: list[tuple[Instance, Outcome]]) -> None:
        answered = []
        for request, outcome in outcomes:
            text, _, _, doc_id, task, _ = request.args
            if isinstance(outcome, Answer):
                answered.append((doc_id, text, outcome))
            else:
                self.failures[task, doc_id] = f"{type(outcome).__name__}: {outcome}"
        if self.store is not None:
            self.store.add(answered)

    @staticmethod
    def _finish(answer: Answer, until: str | Sequence[str]) -> GenerationResult:
        text = answer.text
        for stop in [until] if isinstance(until, str) else until:
            if stop:
                text = text.split(stop)[0]
        return GenerationResult(text.strip(), TokenCounts(answer.prompt_tokens, answer.new_tokens))

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Not supported: the paper's tasks all generate."""
        raise NotImplementedError("pmod answers generate_until tasks only, not loglikelihood ones")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not supported: the paper's tasks have one round."""
        raise NotImplementedError("pmod answers generate_until tasks only, not multi-round ones")

    def measure_gain(self) -> None:
        """Find out what the batch size that ``auto`` found is worth."""
        if self.sizer.auto:
            self.gain = measure_gain(self.vlm, self.sizer)

    def conditions(self) -> dict[str, Any]:
        """What an answer depends on besides checkpoint and prompt."""
        return {key: self.info()[key] for key in ("dtype", "device", "attention", "preparation")}

    def info(self) -> dict[str, Any]:
        """What a report says about how the answers came about."""
        return {
            "dtype": str(self.vlm.model.dtype).removeprefix("torch."),
            "device": self.vlm.device.type,
            "attention": self.vlm.model.config._attn_implementation,
            "preparation": preparation(self.vlm.processor),
            "batch": {
                "largest": self.sizer.largest,
                "out_of_memory": self.sizer.out_of_memory,
                "gain": vars(self.gain) | {"factor": self.gain.factor} if self.gain else None,
            },
        }
