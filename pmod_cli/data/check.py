"""``pmod data check``: everything that would go wrong with a data file, before hours are spent."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pmod_cli.data.dataset import open_data
from pmod_cli.data.pictures import Pictures
from pmod_cli.data.records import BadSample, Conversation, parse_record
from pmod_cli.output.errors import PmodError
from pmod_cli.output.tables import Table


@dataclass(frozen=True)
class BadRecord:
    """One record that is not fit for training.

    Attributes:
        index: Its place in the file, from 0.
        id: Its own id, if it has one.
        kind: What is wrong, in a word or two: what `DataReport.counts` counts.
        detail: The whole message.
    """

    index: int
    id: str
    kind: str
    detail: str

    def to_text(self) -> str:
        """The record in one line."""
        return f"record {self.index} (id {self.id or '-'}): {self.detail}"


@dataclass(frozen=True)
class DataReport:
    """What the check found.

    Attributes:
        records: Records in the file.
        good: Records that are fit for training.
        with_images: How many of the good ones have images.
        counts: Unfit records by kind.
        problems: The unfit records, in the order of the file.
        longest_tokens: Tokens of the longest good record, if a processor was given; else None.
        fixed: The clean file, if one was asked for.
    """

    records: int
    good: int
    with_images: int
    counts: dict[str, int]
    problems: list[BadRecord]
    longest_tokens: int | None
    fixed: str | None

    def to_dict(self) -> dict[str, Any]:
        """Everything, in what JSON can write."""
        return asdict(self)

    def to_table(self) -> Table:
        """The counts as a table."""
        rows: list[Sequence[str]] = [[kind, str(count)] for kind, count in self.counts.items()]
        return Table(f"{self.good} of {self.records} records are fit", ("problem", "records"), rows)


def check_data(
    data: str | Path,
    images: Path | None,
    *,
    processor: Any = None,
    max_length: int = 2048,
    fix: Path | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> DataReport:
    """Read every record, decode every image, and, with a processor, build every sample's labels.

    Args:
        data: LLaVA JSON or JSONL, or a `datasets` folder or hub id.
        images: The folder that a file's image names are relative to.
        processor: The processor of the model to be trained, to find samples whose answers all lie past
            ``max_length``; None leaves that out.
        max_length: In tokens.
        fix: Write the good records here, as they were (JSON, or JSONL by the suffix; of a table, a folder).
        force: Overwrite ``fix``.
        progress: Called with the records done and the records in all.

    Raises:
        PmodError: The data cannot be read, or ``fix`` exists or cannot be written.
    """
    if fix is not None and fix.exists() and not force:
        raise PmodError(f"{fix} exists", "--force replaces it")
    source = open_data(data, images)
    if fix is not None:
        source.check_writable(fix)
    checker = _Checker(source.pictures, processor, max_length)
    problems: list[BadRecord] = []
    good: list[int] = []
    with_images = 0
    for index, record in enumerate(source.records):
        try:
            with_images += bool(checker.check(record, index).images)
            good.append(index)
        except BadSample as error:
            name = record.get("id", "") if isinstance(record, dict) else ""
            problems.append(BadRecord(index, str(name), error.kind, str(error)))
        if progress is not None:
            progress(index + 1, len(source.records))
    if fix is not None:
        source.write(good, fix)
    return DataReport(
        records=len(source.records),
        good=len(good),
        with_images=with_images,
        counts=dict(Counter(problem.kind for problem in problems).most_common()),
        problems=problems,
        longest_tokens=checker.longest,
        fixed=str(fix) if fix is not None else None,
    )


class _Checker:
    """Does to a record what training would do, and remembers the records before it."""

    def __init__(self, pictures: Pictures, processor: Any, max_length: int) -> None:
        self.pictures = pictures
        self.encoder = None
        if processor is not None:
            from pmod_cli.data.batches import EncodedDataset  # imports torch

            self.encoder = EncodedDataset([], pictures, processor, max_length)
        self.longest: int | None = None
        self._seen: set[str] = set()
        self._readable: set[str] = set()

    def check(self, record: Any, index: int) -> Conversation:
        """Parse a record, decode its images and encode it.

        Raises:
            BadSample: It is not fit.
        """
        sample = parse_record(record, index)
        key = json.dumps([record.get("image"), record["conversations"]], sort_keys=True)
        if key in self._seen:
            raise BadSample("duplicate", "the same image and conversation stand earlier in the file")
        if self.encoder is not None:
            pictures = [self.pictures.load(name) for name in sample.images]
            self.longest = max(self.longest or 0, len(self.encoder.encode(sample, pictures).input_ids))
        else:
            for name in sample.images:
                if name not in self._readable:  # many records may name one image
                    self.pictures.load(name)
                    self._readable.add(name)
        self._seen.add(key)
        return sample
