"""Samples that two models scored differently, with their pictures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from pmod_cli.output.errors import PmodError
from pmod_cli.report.document import Example
from pmod_cli.report.models import Model, answers

_LONG_SIDE = 480


@dataclass(frozen=True)
class Changes:
    """Where two models differ.

    Attributes:
        compared: Samples that both answered.
        worse: Of them, those that the model scored lower on than the other.
        better: Those that it scored higher on.
        shown: A few of each, as blocks.
    """

    compared: int
    worse: int
    better: int
    shown: list[Example]


def changes(model: Model, other: Model, tasks: Sequence[str], most: int) -> Changes:
    """Compare two models sample by sample.

    Args:
        model: The one whose gains and losses are counted.
        other: What it is compared with.
        tasks: Leaf tasks.
        most: Examples to show, half of them losses if there are enough.
    """
    compared, found = 0, []
    for task in tasks:
        ours, theirs = answers(model, task), answers(other, task)
        for document in ours.keys() & theirs.keys():
            before, after = theirs[document], ours[document]
            if before["prompt"] != after["prompt"] or None in (before["score"], after["score"]):
                continue
            compared += 1
            if before["score"] != after["score"]:
                found.append((after["score"] - before["score"], task, document, before, after))
    found.sort(key=lambda entry: (entry[1], entry[2]))
    worse = [entry for entry in found if entry[0] < 0]
    better = [entry for entry in found if entry[0] > 0]
    losses = max(most // 2, most - len(better))
    chosen = [*worse[:losses], *better[: most - len(worse[:losses])]]
    pictures = _pictures(model, [(task, document) for _, task, document, _, _ in chosen])
    shown = [
        Example(
            f"{task}-{document}",
            f"{task}, sample {document}: {'worse' if gain < 0 else 'better'}",
            [
                ("question", str(after["prompt"])),
                ("right", str(after["target"])),
                (other.label, f"{before['answer']} ({before['score']:.2g})"),
                (model.label, f"{after['answer']} ({after['score']:.2g})"),
            ],
            pictures.get((task, document), []),
        )
        for gain, task, document, before, after in chosen
    ]
    return Changes(compared, len(worse), len(better), shown)


def _pictures(model: Model, wanted: Sequence[tuple[str, Any]]) -> dict[tuple[str, Any], list[bytes]]:
    """Pictures of documents, from the tasks' data; none where the data, or lmms-eval, is not at hand."""
    if not wanted:
        return {}
    from pmod_cli.evaluation.diff import pictures_of

    folder = model.samples[wanted[0][0]][0].path
    try:
        found = pictures_of(wanted, folder)
    except (PmodError, OSError):
        return {}
    return {
        key: [_encode(picture) for picture in pictures if isinstance(picture, Image.Image)]
        for key, pictures in found.items()
    }


def _encode(picture: Image.Image) -> bytes:
    picture = picture.convert("RGB")
    picture.thumbnail((_LONG_SIDE, _LONG_SIDE))
    buffer = io.BytesIO()
    small = picture.width * picture.height <= 200 * 200
    picture.save(buffer, "PNG" if small else "JPEG", optimize=True, **({} if small else {"quality": 85}))
    return buffer.getvalue()
