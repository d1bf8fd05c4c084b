"""Documents that two models scored differently, with their pictures."""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image

from pmod_cli.evaluation.diff import Change, Comparison, compare_answers, pictures_of
from pmod_cli.output.errors import PmodError
from pmod_cli.report.document import Example
from pmod_cli.report.models import Model, answers

_LONG_SIDE = 480


def changes(model: Model, other: Model, most: int) -> tuple[Comparison, list[Example]]:
    """Compare two models document by document.

    Args:
        model: The one whose gains and losses are counted.
        other: What it is compared with.
        most: Examples to show, half of them losses if there are enough.

    Returns:
        What differs, and the examples.
    """
    tasks = [task for task in model.samples if task in other.samples]
    ours, theirs = ({task: answers(side, task) for task in tasks} for side in (model, other))
    found = compare_answers(theirs, ours)
    losses = found.worse[: max(most // 2, most - len(found.better))]
    chosen = [*losses, *found.better[: most - len(losses)]]
    pictures = _pictures(model, [(change.task, change.doc_id) for change in chosen])
    return found, [
        _example(change, model, other, pictures.get((change.task, change.doc_id), [])) for change in chosen
    ]


def _example(change: Change, model: Model, other: Model, pictures: Sequence[bytes]) -> Example:
    return Example(
        f"{change.task}-{change.doc_id}",
        f"{change.task}, sample {change.doc_id}: {'worse' if change.gain < 0 else 'better'}",
        [
            ("question", str(change.after["prompt"])),
            ("right", str(change.after["target"])),
            (other.label, f"{change.before['answer']} ({change.before['score']:.2g})"),
            (model.label, f"{change.after['answer']} ({change.after['score']:.2g})"),
        ],
        pictures,
    )


def _pictures(model: Model, wanted: Sequence[tuple[str, int]]) -> dict[tuple[str, int], list[bytes]]:
    """Pictures of documents, from the tasks' data; none where the data, or lmms-eval, are not there."""
    if not wanted:
        return {}
    evaluation, _ = model.samples[wanted[0][0]]
    try:
        found = pictures_of(wanted, evaluation.path)
    except (PmodError, OSError):
        return {}
    return {
        key: [_encode(picture) for picture in pictures if isinstance(picture, Image.Image)]
        for key, pictures in found.items()
    }


def _encode(picture: Image.Image) -> bytes:
    """A picture small enough for a page: PNG if it has few pixels, else JPEG."""
    picture = picture.convert("RGB")
    picture.thumbnail((_LONG_SIDE, _LONG_SIDE))
    buffer = io.BytesIO()
    if picture.width * picture.height <= 200 * 200:
        picture.save(buffer, "PNG", optimize=True)
    else:
        picture.save(buffer, "JPEG", optimize=True, quality=85)
    return buffer.getvalue()
