"""Batch sizes, order, and what happens to a sample that raises."""

from __future__ import annotations

import random
import re
import resource
from pathlib import Path

import pytest
import torch

from pmod_cli.evaluation.batching import BatchSizer, Question, answer_all, parse_batch_size
from pmod_cli.generation import Answer, VisionLanguageModel
from pmod_cli.prompts import Prompt
from tests.common.eval_models import noise


@pytest.fixture(scope="module", params=["llava", "pmod"])
def model(request):
    return VisionLanguageModel.load(request.getfixturevalue(request.param))


@pytest.fixture(scope="module")
def dense(llava):
    """One model is enough where only sizes matter."""
    return VisionLanguageModel.load(llava)


@pytest.fixture(scope="module")
def alone(model):
    """The answers to `questions` one at a time."""
    return [model.generate([question.make()], max_new_tokens=6)[0] for question in questions(23)]


class Limited(VisionLanguageModel):
    """Runs out of memory above some number of prompts, as a small GPU does."""

    def __init__(self, model, most):
        super().__init__(model.model, model.processor)
        self.most = most
        self.sizes = []

    def generate(self, prompts, **settings):
        self.sizes.append(len(prompts))
        if len(prompts) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().generate(prompts, **settings)


def questions(count, seed=0):
    rng = random.Random(seed)
    prompts = [
        Prompt(
            "What? " * rng.randint(1, 30) + str(index), tuple(noise(rng) for _ in range(rng.randint(0, 2)))
        )
        for index in range(count)
    ]
    return [Question(prompt.text, lambda prompt=prompt: prompt) for prompt in prompts]


def collect(model, asked, sizer):
    outcomes = {}
    for batch in answer_all(model, asked, {"max_new_tokens": 6}, sizer):
        assert not outcomes.keys() & batch.keys()
        outcomes |= batch
    assert sorted(outcomes) == list(range(len(asked)))
    return [outcomes[index] for index in range(len(asked))]


def test_every_sample_of_llava_next_is_answered_as_alone(pmod_next):
    model = VisionLanguageModel.load(pmod_next)
    asked = questions(16)
    alone = [model.generate([question.make()], max_new_tokens=6)[0] for question in asked]
    assert collect(model, asked, BatchSizer(5)) == alone


@pytest.mark.parametrize("setting", [1, 2, 7, "auto"])
def test_every_batch_size_gives_the_same_answers(model, alone, setting):
    sizer = BatchSizer(setting)
    assert collect(model, questions(23), sizer) == alone
    assert sizer.largest == {1: 1, 2: 2, 7: 7, "auto": 11}[setting]


def test_auto_finds_the_largest_batch_that_fits(dense):
    limited = Limited(dense, most=9)
    sizer = BatchSizer("auto")
    asked = questions(60)
    assert collect(limited, asked, sizer) == collect(dense, asked, BatchSizer(1))
    assert sizer.largest == 9
    assert [size for size in limited.sizes if size > 9] == [
        16,
        12,
        10,
    ]  # halfway between what fits and what does not
    assert sizer.out_of_memory == 3


def test_longer_prompts_later_need_smaller_batches(dense):
    limited = Limited(dense, most=8)
    sizer = BatchSizer("auto")
    collect(limited, questions(60), sizer)
    assert sizer.size == 8
    limited.most = 5
    outcomes = collect(limited, questions(60), sizer)
    assert all(isinstance(outcome, Answer) for outcome in outcomes)
    assert sizer.size == 5


def test_memory_that_really_runs_out(llava):
    """The allocator itself refuses: scores of 16 long prompts at once do not fit, those of fewer do."""
    model = VisionLanguageModel.load(llava, attn_implementation="eager")
    asked = [
        Question(text, lambda text=text: Prompt(text)) for text in ("word " * 120 + str(i) for i in range(30))
    ]
    expected = [model.generate([question.make()], max_new_tokens=2)[0] for question in asked]
    status = Path("/proc/self/status").read_text()
    in_use = 1024 * int(re.search(r"VmSize:\s+(\d+) kB", status)[1])
    sizer = BatchSizer("auto")
    _, hard = limits = resource.getrlimit(resource.RLIMIT_AS)
    # One layer's scores are 4 heads x 600 x 600 x 4 bytes = 6 MB a prompt, and there are a few copies of them.
    resource.setrlimit(resource.RLIMIT_AS, (in_use + 150 * 2**20, hard))
    try:
        outcomes = [
            outcome
            for batch in answer_all(model, asked, {"max_new_tokens": 2}, sizer)
            for outcome in batch.items()
        ]
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert [dict(outcomes)[index] for index in range(30)] == expected
    assert sizer.out_of_memory >= 1
    assert 1 <= sizer.largest < 16


def test_a_given_batch_size_also_steps_down(dense):
    limited = Limited(dense, most=1)
    sizer = BatchSizer(4)
    outcomes = collect(limited, questions(6), sizer)
    assert all(isinstance(outcome, Answer) for outcome in outcomes)
    assert sizer.size == 1


def test_a_sample_too_large_even_alone_is_a_failure_of_its_own(dense):
    limited = Limited(dense, most=0)
    outcomes = collect(limited, questions(3), BatchSizer(2))
    assert all(isinstance(outcome, torch.OutOfMemoryError) for outcome in outcomes)


def test_one_bad_sample_does_not_take_others_with_it(model):
    asked = questions(9)

    def broken():
        raise OSError("image file is truncated")

    asked[3] = Question(asked[3].text, broken)
    asked[5] = Question(asked[5].text, lambda: Prompt("a picture of nothing", ("not a picture",)))
    outcomes = collect(model, asked, BatchSizer(4))
    assert isinstance(outcomes[3], OSError)
    assert isinstance(outcomes[5], AttributeError)
    for index in set(range(9)) - {3, 5}:
        assert outcomes[index] == model.generate([asked[index].make()], max_new_tokens=6)[0]


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
def test_bad_batch_sizes_are_refused(value):
    with pytest.raises(ValueError):
        parse_batch_size(value)


def test_batch_sizes_come_as_strings():
    assert parse_batch_size("16") == 16
    assert parse_batch_size("auto") == "auto"
