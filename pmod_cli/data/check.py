"""``pmod data check``: everything that would go wrong with a data file, before hours are spent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pmod_cli.data.dataset import open_data
from pmod_cli.data.records import READ, BadSample, parse_record, unread_keys
from pmod_cli.output.files import check_place
from pmod_cli.pictures import notes_of


def check_data(
    data: str | Path,
    images: Path | None,
    *,
    processor: Any = None,
    max_length: int = 2048,
    image_position: str = "written",
    fix: Path | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Read every record, decode every image, and, with a processor, build every sample's labels.

    Args:
        data: LLaVA JSON or JSONL, or a `datasets` folder or hub id.
        images: The folder that a file's image names are relative to.
        processor: The processor of the model to be trained, to find samples whose answers all lie past
            ``max_length``; None leaves that out.
        max_length: In tokens.
        image_position: As in the recipe; a picture that it moves is noted.
        fix: Write the good records here, as they were (JSON, or JSONL by the suffix; of a table, a folder).
        force: Replace ``fix``, if pmod wrote it.
        progress: Called with the records done and the records in all.

    Returns:
        What ``docs/json.md`` lists for ``pmod data check --json``.

    Raises:
        PmodError: The data cannot be read, or ``fix`` exists or cannot be written.
    """
    if fix is not None and not force:
        check_place(fix, force)
    source = open_data(data, images)
    if fix is not None:
        source.check_writable(fix)
        check_place(fix, force, [data, *([images] if images else [])])
    encoder = None
    if processor is not None:
        from pmod_cli.data.batches import EncodedDataset  # imports torch

        encoder = EncodedDataset([], source.pictures, processor, max_length, image_position)
    problems: list[dict[str, Any]] = []
    good: list[int] = []
    with_images, longest = 0, None
    columns = source.table.column_names if source.table is not None else ()
    notes = Counter({f"key {name} is not read": len(source.records) for name in columns if name not in READ})
    seen: set[Any] = set()
    readable: set[str] = set()  # many records may name one image
    for index, record in enumerate(source.records):
        try:
            sample = parse_record(record, index)
            key = (sample.images, sample.turns)
            if key in seen:
                raise BadSample("duplicate", "the same image and conversation stand earlier in the file")
            names = (
                sample.images
                if encoder is not None
                else [name for name in sample.images if name not in readable]
            )
            pictures = [source.pictures.load(name) for name in names]
            if encoder is not None:
                longest = max(longest or 0, len(encoder.encode(sample, pictures).input_ids))
            for name, picture in zip(names, pictures, strict=True):
                if name not in readable:
                    notes.update(f"picture {note}" for note in notes_of(picture))
                    readable.add(name)
            notes.update(f"key {unread} is not read" for unread in unread_keys(record))
            if encoder is not None and encoder.encoder.moves(sample.turns):
                notes["picture moved in front of the words (train.image_position)"] += 1
            seen.add(key)
            good.append(index)
            with_images += bool(sample.images)
        except BadSample as error:
            name = record.get("id", "") if isinstance(record, dict) else ""
            problems.append({"index": index, "id": str(name), "kind": error.kind, "detail": str(error)})
        if progress is not None:
            progress(index + 1, len(source.records))
    if fix is not None:
        source.write(good, fix, force=force)
    return {
        "records": len(source.records),
        "good": len(good),
        "with_images": with_images,
        "counts": dict(Counter(problem["kind"] for problem in problems).most_common()),
        "problems": problems,
        "notes": dict(notes.most_common()),
        "longest_tokens": longest,
        "fixed": str(fix) if fix is not None else None,
    }
