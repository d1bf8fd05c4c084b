"""A chat's turn becomes what `generate` makes of the same prompt, for each of today's families."""

from __future__ import annotations

import random

import pytest
import torch

from pmod_cli.families.processing import turn_of_parts
from pmod_cli.generation import VisionLanguageModel
from pmod_cli.prompts import Prompt
from tests.common.eval_models import noise
from tests.common.family_models import MAKERS


@pytest.mark.parametrize("family", MAKERS)
def test_a_turn_is_the_prompt(family):
    dense, processor = MAKERS[family]()
    model, rng = VisionLanguageModel(dense, processor), random.Random(0)
    images = (noise(rng, 60, 40), noise(rng, 40, 60))
    for prompt, parts, shown in (
        ("What is it?", ["What is it?"], ()),
        ("What is it?", [None, None, " What is it?"], images),
        ("Is<image> like<image>?", ["Is", None, " like", None, "?"], images),
    ):
        expected = model.encode([Prompt(prompt, shown)])
        made = model.encode_chat([turn_of_parts(processor, "user", parts)], list(shown))
        assert made.keys() == expected.keys()
        for name in expected:
            assert torch.equal(torch.as_tensor(made[name]), torch.as_tensor(expected[name])), name
