"""Data sources: LLaVA JSON beside a folder of images, or a `datasets` table with an image column."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pmod_cli.checkpoints.source import is_hub_id
from pmod_cli.data.pictures import ImageColumn, ImageFolder, Pictures
from pmod_cli.data.records import BadSample, Conversation, parse_json, parse_record
from pmod_cli.extras import require
from pmod_cli.output.errors import PmodError, first_line
from pmod_cli.output.files import BLANK_TAG, check_regular, replacing, write_file


@dataclass(frozen=True)
class DataSource:
    """Records as they are in the data, and their pictures.

    Attributes:
        records: In LLaVA's form, for `parse_record`.
        pictures: Where the records' images are.
        fingerprint: SHA-256 of the file, or of a table's conversations.
        table: The `datasets.Dataset`, or None for a file.
    """

    name: str
    records: list[Any]
    pictures: Pictures
    fingerprint: str
    table: Any = None

    @cached_property
    def _parsed(self) -> tuple[list[Conversation], dict[str, str]]:
        samples, bad = [], {}
        for index, record in enumerate(self.records):
            try:
                samples.append(parse_record(record, index))
            except BadSample as error:
                name = record.get("id", index) if isinstance(record, dict) else index
                bad[str(name)] = str(error)
        if not samples:
            first = next(iter(bad.values()))
            raise PmodError(f"{self.name}: no usable record; the first: {first}", "see pmod data check")
        return samples, bad

    @property
    def samples(self) -> list[Conversation]:
        """The usable records; `PmodError` if there are none."""
        return self._parsed[0]

    @property
    def bad(self) -> dict[str, str]:
        """Id -> reason, of the records left out."""
        return self._parsed[1]

    def missing_images(self) -> dict[str, str]:
        """Id -> reason, of the samples whose images are not there; no image is opened."""
        missing = {}
        for sample in self.samples:
            try:
                for name in sample.images:
                    self.pictures.find(name)
            except BadSample as error:
                missing[sample.id] = str(error)
        return missing

    def check_writable(self, path: Path) -> None:
        """Refuse a path that `write` cannot write to, before hours are spent on what it writes."""
        if path.exists() and path.is_dir() != (self.table is not None):
            raise PmodError(f"{path} is a {'folder' if path.is_dir() else 'file'}", "give another name")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PmodError(f"cannot write {path}: {error.strerror}") from error
        if not os.access(path.parent, os.W_OK):
            raise PmodError(f"cannot write {path}: {path.parent} is not writable")

    def write(self, indices: Sequence[int], path: Path, *, force: bool = False) -> None:
        """Write some records as they are: a JSON (or JSONL) file, or a table's folder. Complete or absent."""
        if self.table is not None:
            with replacing(path, force=force) as partial:
                self.table.select(indices).save_to_disk(str(partial))
            return
        chosen = [self.records[index] for index in indices]
        if path.suffix == ".jsonl":
            text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in chosen)
        else:
            text = json.dumps(chosen, ensure_ascii=False, indent=1)
        write_file(path, text + BLANK_TAG, force=force)


def open_data(data: str | Path, images: Path | None) -> DataSource:
    """Open training data, without looking into its records.

    Args:
        data: A LLaVA JSON or JSONL file; or a folder or hub id that `datasets` opens, with the columns
            ``conversations`` and ``image`` (or ``images``).
        images: The folder that a file's image names are relative to; a table holds its images.

    Raises:
        PmodError: The data is missing, cannot be read, or has another form; or `datasets` is missing.
    """
    path = Path(data)
    if path.is_dir():
        return _open_table(str(data), path)
    name = str(data)
    if is_hub_id(name) and not path.suffix:
        return _open_table(name, None)
    try:
        check_regular(path)
        content = path.read_bytes()
    except FileNotFoundError:
        raise PmodError(f"no data file {path}") from None
    except (OSError, ValueError) as error:
        raise PmodError(f"cannot read {path}: {first_line(error)}") from error
    records = parse_json(content, path)
    if any(isinstance(record, dict) and record.get("image") for record in records):
        if images is None:
            raise PmodError(f"{path} names image files", "--images says which folder they are in")
        if not images.is_dir():
            raise PmodError(f"no image folder {images}")
    folder = images if images is not None else path.parent
    return DataSource(str(path), records, ImageFolder(folder), hashlib.sha256(content).hexdigest())


def _open_table(name: str, folder: Path | None) -> DataSource:
    require("datasets", "train")
    from datasets import Image as ImageFeature
    from datasets import config, load_dataset, load_from_disk

    kinds = ("state.json", "dataset_dict.json")
    saved = folder is not None and any((folder / kind).is_file() for kind in kinds)
    try:
        table = load_from_disk(name) if saved else load_dataset(name)
    except Exception as error:  # of any kind, over a stranger's files
        raise PmodError(
            f"cannot open data set {name}: {first_line(error)}",
            "a LLaVA .json or .jsonl file, a datasets folder or a hub id is expected",
        ) from error
    if isinstance(table, dict):
        if "train" not in table and len(table) > 1:
            raise PmodError(f"data set {name} has no split named train", f"it has: {', '.join(table)}")
        table = table["train"] if "train" in table else next(iter(table.values()))
    column = next((column for column in ("image", "images") if column in table.column_names), None)
    if "conversations" not in table.column_names or column is None:
        raise PmodError(
            f"data set {name} lacks the columns conversations and image",
            f"it has: {', '.join(table.column_names)}",
        )
    if not len(table):
        raise PmodError(f"data set {name} holds no records")
    feature = table.features[column]
    if not isinstance(getattr(feature, "feature", feature), ImageFeature):
        raise PmodError(
            f"column {column} of data set {name} holds no images but {feature}",
            "a LLaVA file whose records name image files goes with --images",
        )
    texts = [other for other in ("id", "conversations") if other in table.column_names]
    records = table.select_columns(texts).to_list()
    for record, names in zip(records, _picture_names(table, column), strict=True):
        record["image"] = names
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(record, sort_keys=True, default=str).encode())
    root = folder if folder is not None else Path(config.HF_CACHE_HOME)
    return DataSource(name, records, ImageColumn(table, column, root), digest.hexdigest(), table)


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
