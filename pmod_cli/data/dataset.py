"""Data sources: LLaVA JSON beside a folder of images, or a `datasets` table with an image column."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pmod_cli.checkpoints.source import is_hub_id
from pmod_cli.data.folder import check_folder
from pmod_cli.data.pictures import ImageColumn, ImageFolder, Pictures
from pmod_cli.data.records import BadSample, dump_records, is_lines, picture_names, read_records, too_deep
from pmod_cli.data.table import RecordTable, Samples, make_table
from pmod_cli.extras import require
from pmod_cli.output.errors import PmodError, first_line
from pmod_cli.output.files import replacing
from pmod_cli.output.marks import BLANK_TAG
from pmod_cli.output.reading import check_regular

_KEPT_FROM = 16 << 20
"""Bytes of a file from which on its table is kept: smaller ones are read as fast as a table is opened."""
_LONGEST = 300
"""Characters of an error of `datasets`, which lists all suffixes that it knows."""
_ROWS = 1000
_LISTED_FROM = 1000
"""Pictures from which on their folders are listed."""


@dataclass(frozen=True)
class DataSource:
    """Records as they are in the data, and their pictures.

    Attributes:
        records: In LLaVA's form, for `parse_record`.
        pictures: Where the records' images are.
        table: The `datasets.Dataset`, or None for a file.
    """

    name: str
    records: RecordTable
    pictures: Pictures
    table: Any = None

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the file, or of a table's conversations."""
        return str(self.records.about["fingerprint"])

    @cached_property
    def samples(self) -> Samples:
        """The usable records; `PmodError` if there are none."""
        samples = Samples(self.records)
        if not len(samples):
            raise self.none_usable(next(iter(self.bad.values())))
        return samples

    def none_usable(self, first: str) -> PmodError:
        """The error to raise where all records are bad; ``first`` is what is wrong with the first."""
        return PmodError(f"{self.name}: no usable record; the first: {first}", "see pmod data check")

    @cached_property
    def bad(self) -> dict[str, str]:
        """Id -> reason, of the records left out; an id that comes again has the record's number behind it."""
        return self.records.bad()

    def missing_images(self) -> dict[str, str]:
        """Id -> reason, of the samples whose images are not there; no image is opened."""
        missing = {}
        find = self.pictures.finder(listing=len(self.records) >= _LISTED_FROM)
        for row, names in self.records.image_names():
            try:
                for name in names:
                    find(name)
            except BadSample as error:
                missing[self.records.sample(row).id] = str(error)
        return missing

    def check_kind(self, path: Path) -> None:
        """Refuse a folder where `write` would put a file, or the reverse."""
        if path.exists() and path.is_dir() != (self.table is not None):
            raise PmodError(f"{path} is a {'folder' if path.is_dir() else 'file'}", "give another name")

    def write(self, indices: Sequence[int], path: Path, *, force: bool = False) -> None:
        """Write some records as they are: a JSON (or JSONL) file, or a table's folder. Complete or absent."""
        if self.table is not None:
            with replacing(path, force=force) as partial:
                self.table.select(indices).save_to_disk(str(partial))
            return
        with replacing(path, force=force) as partial, partial.open("w", encoding="utf-8", newline="") as file:
            file.writelines(dump_records(map(self.records.__getitem__, indices), path))
            file.write(BLANK_TAG)


def open_data(data: str | Path, images: Path | None) -> DataSource:
    """Open training data, without looking into its records.

    Args:
        data: A LLaVA JSON or JSONL file; or a Parquet file, folder or hub id that `datasets` opens, with the columns
            ``conversations`` (or ``messages``) and ``image`` (or ``images``).
        images: The folder that a file's image names are relative to; a table holds its images.

    Raises:
        PmodError: The data is missing, cannot be read, or has another form; or `datasets` is missing.
    """
    path, name = Path(data), str(data)
    if path.is_dir():
        return _open_table(name, path)
    if is_hub_id(name) and not path.suffix:
        return _open_table(name, None)
    with _one_line(path):
        check_regular(path)
    if path.suffix.lower() == ".parquet":
        return _open_table(name, path)
    records = _table_of_file(path)
    if records.about["names_images"]:
        if images is None:
            raise PmodError(f"{path} names image files", "--images says which folder they are in")
        if not images.is_dir():
            raise PmodError(f"no image folder {images}")
    return DataSource(str(path), records, ImageFolder(images if images is not None else path.parent))


@contextlib.contextmanager
def _one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise PmodError(f"no data file {path}") from None
    except (OSError, ValueError) as error:
        raise PmodError(f"cannot read {path}: {first_line(error)}") from error


def _table_of_file(path: Path) -> RecordTable:
    """The records of a JSON file, by its SHA-256."""
    digest = hashlib.sha256()
    with _one_line(path), path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
        before = os.fstat(file.fileno())

    def records(about: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        named = False
        for text, record in read_records(path):
            named = named or _has_pictures(record)
            yield text, record
        after = path.stat()
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise PmodError(f"{path} changed while it was read", "start again when it is complete")
        about.update(fingerprint=digest.hexdigest(), names_images=named)

    kind = "lines" if is_lines(path) else "list"
    return make_table(records, f"{kind} {digest.hexdigest()}" if before.st_size >= _KEPT_FROM else None)


def _has_pictures(record: Any) -> bool:
    try:
        return isinstance(record, dict) and bool(picture_names(record))
    except BadSample:
        return True


def _open_table(name: str, folder: Path | None) -> DataSource:
    require("datasets", "train")
    from datasets import Image as ImageFeature
    from datasets import List, config, load_dataset, load_from_disk

    kinds = ("state.json", "dataset_dict.json")
    saved = folder is not None and any((folder / kind).is_file() for kind in kinds)
    try:
        if folder is None:
            table = load_dataset(name)
        elif folder.is_file():
            table = load_dataset("parquet", data_files=glob.escape(str(folder.absolute())), split="train")
        else:
            check_folder(folder)
            # An absolute path is never taken for a hub id, or for the name of a format.
            table = (load_from_disk if saved else load_dataset)(str(folder.absolute()))
    except PmodError:
        raise
    except Exception as error:  # of any kind, over a stranger's files
        raise PmodError(
            f"cannot open data set {name}: {first_line(error.__cause__ or error)[:_LONGEST]}",
            "a LLaVA .json or .jsonl file, a datasets folder or a hub id is expected",
        ) from error
    if isinstance(table, dict):
        if "train" not in table and len(table) > 1:
            raise PmodError(f"data set {name} has no split named train", f"it has: {', '.join(table)}")
        table = table["train"] if "train" in table else next(iter(table.values()))
    column = next((column for column in ("image", "images") if column in table.column_names), None)
    talk = next((name for name in ("conversations", "messages") if name in table.column_names), None)
    if talk is None or column is None:
        raise PmodError(
            f"data set {name} lacks the columns conversations and image",
            f"it has: {', '.join(table.column_names)}",
        )
    if not len(table):
        raise PmodError(f"data set {name} holds no records")
    feature = table.features[column]
    if not isinstance(getattr(feature, "feature", feature), ImageFeature):
        # Written without `datasets`: the bytes themselves, a struct of bytes and path, or no row has any.
        listed = hasattr(feature, "feature")
        one = feature.feature if listed else feature
        plain = isinstance(one, dict) and one.keys() <= {"bytes", "path"}
        if not plain and getattr(one, "dtype", None) not in ("binary", "large_binary", "null"):
            raise PmodError(
                f"column {column} of data set {name} holds no images but {feature}",
                "a LLaVA file whose records name image files goes with --images",
            )
        images = ImageFeature()
        table = table.cast_column(column, List(images) if listed else images)
    root = Path(config.HF_CACHE_HOME) if folder is None else folder.parent if folder.is_file() else folder
    return DataSource(name, _table_of_rows(table, column, talk), ImageColumn(table, column, root), table)


def _table_of_rows(table: Any, column: str, talk: str) -> RecordTable:
    """The records of a `datasets` table, by the names, sizes and times of its files."""
    texts = [other for other in ("id", talk, "system") if other in table.column_names]
    rows = table.select_columns(texts)

    def records(about: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        digest = hashlib.sha256()
        names = _picture_names(table, column)
        for start in range(0, len(rows), _ROWS):
            for record in rows.select(range(start, min(start + _ROWS, len(rows)))).to_list():
                record["image"] = next(names)
                record["conversations"] = _turns(record.pop(talk))
                digest.update(json.dumps(record, sort_keys=True, default=str).encode())
                if not isinstance(record.get("id"), str | int | float | None):
                    record["id"] = str(record["id"])
                # What is no text stays none.
                yield json.dumps(record, ensure_ascii=False, default=lambda value: [str(value)]), record
        about.update(fingerprint=digest.hexdigest(), names_images=False)

    files = [Path(file["filename"]) for file in table.cache_files]
    facts = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    large = sum(size for _, size, _ in facts) >= _KEPT_FROM
    return make_table(records, json.dumps([facts, len(rows), column, talk]) if large else None)


def _turns(cell: Any) -> Any:
    """A row's conversation as a list of turns; some tables hold it as JSON, or as one list per key."""
    if isinstance(cell, str):
        try:
            turns = json.loads(cell)
        except (ValueError, RecursionError):
            return cell  # `parse_record` says what is wrong
        return cell if too_deep(turns) else turns
    if isinstance(cell, dict) and cell and all(isinstance(column, list) for column in cell.values()):
        return [dict(zip(cell, turn, strict=False)) for turn in zip(*cell.values(), strict=False)]
    return cell


def _picture_names(table: Any, column: str) -> Iterator[list[str]]:
    """Names for the pictures of each row, as `ImageColumn` knows them; their bytes are not read."""
    import pyarrow.compute as compute
    from datasets import Image as ImageFeature

    cells = table.data.column(column)
    if isinstance(table.features[column], ImageFeature):
        for row, there in enumerate(cells.is_valid().to_pylist()):
            yield [str(row)] if there else []
    else:
        for row, length in enumerate(compute.list_value_length(cells).to_pylist()):
            yield [f"{row}:{place}" for place in range(length or 0)]
