"""The records of a data file as one Arrow file, which all processes map into memory and share.

It holds each record as JSON, and what the order of samples and the checks before a run need to know of it, so that
nothing has to be read again. Large ones are kept in pmod's cache, by the fingerprint of what they were made from.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, overload

import numpy as np
import pyarrow as pa
from filelock import FileLock

from pmod_cli.data.records import BadSample, Conversation, parse_record
from pmod_cli.output.errors import PmodError, first_line
from pmod_cli.output.files import open_folder, replacing
from pmod_cli.output.paths import cache_folder

_log = logging.getLogger(__name__)
_BATCH = 4096
_ABOUT = b"about"
_SCHEMA = pa.schema(
    [
        ("record", pa.large_binary()),
        ("label", pa.binary()),
        ("reason", pa.string()),
        ("images", pa.list_(pa.binary())),
        ("characters", pa.int32()),
        ("octets", pa.int32()),
        ("turns", pa.int32()),
    ]
)
_MADE_BY = b"".join(module.read_bytes() for module in sorted(Path(__file__).parent.glob("*.py")))
"""A table that other code made is made anew."""


@dataclass(frozen=True)
class Shapes:
    """What is known of samples without reading them: arrays, one number per sample.

    Attributes:
        images: Pictures.
        characters: Of all turns' words.
        octets: The same in UTF-8.
        turns: Messages.
    """

    images: np.ndarray
    characters: np.ndarray
    octets: np.ndarray
    turns: np.ndarray

    @classmethod
    def of(cls, samples: Sequence[Conversation]) -> Shapes:
        """The shapes of samples; those of a table are at hand."""
        if isinstance(samples, Samples):
            return samples.shapes
        return cls(*np.array([_shape(sample) for sample in samples]).reshape(-1, 4).T)


def _shape(sample: Conversation) -> tuple[int, int, int, int]:
    words = [turn.words for turn in sample.turns]
    return len(sample.images), sum(map(len, words)), sum(len(text.encode()) for text in words), len(words)


class RecordTable(Sequence[Any]):
    """Records as they are in the data, read from the table when they are asked for.

    Attributes:
        about: What `make_table` was given: of the whole data.
    """

    def __init__(self, path: Path, folder: TemporaryDirectory[str] | None = None) -> None:
        self._path, self._folder = path, folder  # a private table goes with its folder
        with pa.ipc.open_file(pa.memory_map(str(path))) as file:
            self._columns = file.read_all()
            last = file.get_batch_with_custom_metadata(file.num_record_batches - 1)
        self.about: dict[str, Any] = json.loads(last.custom_metadata[_ABOUT])
        self._records, self._labels = self._columns["record"], self._columns["label"]

    def __reduce__(self) -> Any:
        # Processes that are not forked map the file again.
        return RecordTable, (self._path,)

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        """A record, newly decoded."""
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:  # far faster than one by one
                return list(map(json.loads, self._records.slice(start, max(0, stop - start)).to_pylist()))
            return [self[row] for row in range(start, stop, step)]
        return json.loads(self._records[int(index)].as_py())

    def sample(self, row: int) -> Conversation:
        """A usable record, read; its id is the label."""
        return _labelled(parse_record(self[row], row), self._label(row))

    def bad(self) -> dict[str, str]:
        """Label -> reason, of the records that are not usable; a label is a record's id, with its row if it repeats."""
        reasons = self._columns["reason"]
        rows = np.flatnonzero(reasons.is_valid())
        return {self._label(row): reasons[row].as_py() for row in rows.tolist()}

    def usable(self) -> np.ndarray:
        """The rows of the usable records."""
        return np.flatnonzero(self._columns["reason"].is_null())

    def shapes(self, rows: np.ndarray) -> Shapes:
        """Of usable records."""
        import pyarrow.compute as compute

        images = compute.list_value_length(self._columns["images"])
        columns = (images, *(self._columns[name] for name in ("characters", "octets", "turns")))
        return Shapes(*(column.to_numpy()[rows] for column in columns))

    def image_names(self) -> Iterator[tuple[int, list[str]]]:
        """(row, names) of the records that have pictures; a batch at a time is in memory."""
        row = 0
        for batch in self._columns.select(["images"]).to_batches():
            for names in batch.column(0).to_pylist():
                if names:
                    yield row, list(map(_unpack, names))
                row += 1

    def _label(self, row: int) -> str:
        return _unpack(self._labels[row].as_py())


class Samples(Sequence[Conversation]):
    """The usable records of a table, each read when it is asked for."""

    def __init__(self, table: RecordTable) -> None:
        self.table, self.rows = table, table.usable()
        self.shapes = table.shapes(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> list[Conversation]: ...
    def __getitem__(self, index: int | slice) -> Any:
        """A sample, newly read."""
        if isinstance(index, slice):
            return [self.table.sample(int(row)) for row in self.rows[index]]
        return self.table.sample(int(self.rows[index]))


def make_table(
    records: Callable[[dict[str, Any]], Iterable[tuple[str, Any]]], fingerprint: str | None
) -> RecordTable:
    """The table of some data: the one in the cache, or a new one.

    Args:
        records: Called to make a new one; gives each record as JSON and decoded. It may fill the dictionary that it
            gets with what is to be known of the whole.
        fingerprint: Of the data. None makes a private table, which is gone after the process.

    Raises:
        PmodError: What ``records`` raises; or there is no space for a table.
    """

    def write(path: Path) -> None:
        about: dict[str, Any] = {}
        _write(path, records(about), about)

    if fingerprint is not None:
        name = hashlib.sha256(fingerprint.encode() + _MADE_BY).hexdigest()[:32]
        path = cache_folder() / "data" / f"{name}.arrow"
        try:
            return _open(path) or _make_shared(path, write)
        except (OSError, NotImplementedError) as error:  # the latter where the file system has no locks
            _log.warning(
                "no table of the data can be kept in %s (%s): each process makes its own, at each start; "
                "PMOD_CACHE names another folder",
                path.parent,
                first_line(error),
            )
    try:
        folder = TemporaryDirectory(prefix="pmod-", ignore_cleanup_errors=True)
        path = Path(folder.name) / "data.arrow"
        write(path)
        return RecordTable(path, folder)
    except OSError as error:
        raise PmodError(
            f"cannot write a table of the data: {first_line(error)}",
            "TMPDIR and PMOD_CACHE name folders for it",
        ) from error


def _open(path: Path) -> RecordTable | None:
    """A table; None if it is not there, or not whole."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # Arrow's errors are of these kinds
        return RecordTable(path)
    return None


def _make_shared(path: Path, write: Callable[[Path], None]) -> RecordTable:
    """One process makes the table, and the others wait for it."""
    open_folder(path.parent, ["*"])
    with FileLock(path.with_suffix(".lock")):
        if (table := _open(path)) is not None:
            return table
        with replacing(path) as partial:
            write(partial)
        return RecordTable(path)


def _write(path: Path, records: Iterable[tuple[str, Any]], about: dict[str, Any]) -> None:
    seen: set[str] = set()
    rows: list[tuple[Any, ...]] = []
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:

        def flush(metadata: dict[bytes, bytes] | None = None) -> None:
            columns = zip(*rows, strict=True) if rows else [()] * len(_SCHEMA)
            arrays = [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
            writer.write_batch(pa.record_batch(arrays, _SCHEMA), custom_metadata=metadata)
            rows.clear()

        for index, (text, record) in enumerate(records):
            # LLaVA's mixes give many records one id: it tells people which record is meant, and nothing else.
            name = record.get("id") if isinstance(record, dict) else None
            label = str(index if name is None else name)
            if label in seen:
                label = f"{label} (record {index})"
            seen.add(label)
            try:
                sample = parse_record(record, index)
                found: tuple[Any, ...] = (None, list(map(_pack, sample.images)), *_shape(sample)[1:])
            except BadSample as error:
                found = (_pack(str(error)).decode(errors="replace"), [], 0, 0, 0)
            rows.append((_pack(text), _pack(label), *found))
            if len(rows) == _BATCH:
                flush()
        flush({_ABOUT: json.dumps(about).encode()})


def _labelled(sample: Conversation, label: str) -> Conversation:
    return sample if sample.id == label else Conversation(label, sample.images, sample.turns)


def _pack(text: str) -> bytes:
    """Arrow's text may hold no halves of surrogate pairs, and JSON's may."""
    return text.encode("utf-8", "surrogatepass")


def _unpack(content: bytes) -> str:
    return content.decode("utf-8", "surrogatepass")
