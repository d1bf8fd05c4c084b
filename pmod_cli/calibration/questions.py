"""Questions about pictures, drawn from training data whose answers are not looked at."""

from __future__ import annotations

import random
from dataclasses import dataclass

from pmod_cli.calibration.options import LEAST_SAMPLES
from pmod_cli.data.dataset import DataSource
from pmod_cli.data.records import BadSample
from pmod_cli.output.errors import PmodError
from pmod_cli.prompts import Prompt

PARTS = {"fit": 0.375, "choose": 0.25, "judge": 0.375}
"""What questions are for, and the share of each: routers are fitted to the first, coverage and ratios are chosen on the
second, and the last tells what came of it. No picture is in two of them."""


@dataclass(frozen=True)
class Question:
    """A question about one picture, and the name of the picture."""

    prompt: Prompt
    picture: str


def draw_questions(source: DataSource, count: int, seed: int) -> dict[str, list[Question]]:
    """Draw questions and divide them.

    Of each record with one picture a question is drawn, asked without the turns before it; where there are fewer such
    records than questions wanted, more questions of each. Records and pictures that cannot be used are passed over.

    Args:
        source: Training data.
        count: Questions in all.
        seed: Of the draw.

    Returns:
        By part of `PARTS`.

    Raises:
        PmodError: There are fewer than `LEAST_SAMPLES`, or fewer than three pictures.
    """
    generator = random.Random(seed)
    records = [sample for sample in source.samples if len(sample.images) == 1]
    generator.shuffle(records)
    asked = []
    for record in records:
        turns = [turn.text for turn in record.turns if turn.role == "user" and turn.text]
        generator.shuffle(turns)
        asked.append((record.images[0], turns))
    drawn: dict[str, list[Question]] = {}
    unreadable, reason = set(), ""
    for turn in range(max((len(turns) for _, turns in asked), default=0)):
        for name, turns in asked:
            if sum(map(len, drawn.values())) == count:
                break
            if turn >= len(turns) or name in unreadable:
                continue
            try:
                picture = drawn[name][0].prompt.images[0] if name in drawn else source.pictures.load(name)
            except BadSample as error:
                unreadable.add(name)
                reason = f"; {error}"
                continue
            drawn.setdefault(name, []).append(Question(Prompt(turns[turn], (picture,)), name))
    total = sum(map(len, drawn.values()))
    if total < LEAST_SAMPLES or len(drawn) < len(PARTS):
        raise PmodError(
            f"{source.name} gives {total} questions about {len(drawn)} pictures{reason}",
            f"at least {LEAST_SAMPLES}, of records with one picture each, are needed",
        )
    return _divide(list(drawn.values()), total)


def _divide(pictures: list[list[Question]], total: int) -> dict[str, list[Question]]:
    """Whole pictures, each to the part that lacks most of its share."""
    parts: dict[str, list[Question]] = {name: [] for name in PARTS}
    for questions in pictures:
        part = min(PARTS, key=lambda name: len(parts[name]) / (PARTS[name] * total))
        parts[part] += questions
    return parts
