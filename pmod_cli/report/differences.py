"""Samples that a p-MoD model and the dense one scored differently, with their pictures."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from pmod_cli import plots
from pmod_cli.evaluation.diff import compare_answers, pictures_of
from pmod_cli.output.errors import PmodError
from pmod_cli.report.document import Block, Example, Section, Text
from pmod_cli.report.models import Model, answers

_EXAMPLES = 8


def differences(models: Sequence[Model], other: Model | None) -> Section:
    """For each p-MoD model what it gains and loses against the dense one; of the examples half are losses."""
    blocks: list[Block] = []
    for model in models:
        if other is None or not model.is_pmod:
            continue
        tasks = [task for task in model.samples if task in other.samples]
        ours, theirs = ({task: answers(side, task) for task in tasks} for side in (model, other))
        found = compare_answers(theirs, ours)
        if not found.compared:
            continue
        losses = found.worse[: max(_EXAMPLES // 2, _EXAMPLES - len(found.better))]
        chosen = [*losses, *found.better[: _EXAMPLES - len(losses)]]
        words = (
            f"{model.label} against {other.label}: of {found.compared} samples {len(found.better)} became right "
            f"or better, {len(found.worse)} wrong or worse."
        )
        pictures = _pictures(model, [(change.task, change.doc_id) for change in chosen])
        blocks.append(Text(words))
        blocks += [
            Example(
                f"{change.task}-{change.doc_id}",
                f"{change.task}, sample {change.doc_id}: {'worse' if change.gain < 0 else 'better'}",
                [
                    ("question", str(change.after["prompt"])),
                    ("right", str(change.after["target"])),
                    (other.label, f"{change.before['answer']} ({change.before['score']:.2g})"),
                    (model.label, f"{change.after['answer']} ({change.after['score']:.2g})"),
                ],
                pictures.get((change.task, change.doc_id), []),
            )
            for change in chosen
        ]
    return Section("Samples that differ", blocks)


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
        key: [
            plots.encode(picture, 480, 200 * 200) for picture in pictures if isinstance(picture, Image.Image)
        ]
        for key, pictures in found.items()
    }
