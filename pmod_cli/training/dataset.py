"""LLaVA's own data: JSON or JSONL records with ``conversations`` and, maybe, ``image``.

Images are opened only when a sample is asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image, UnidentifiedImageError

from pmod_cli.errors import PmodError

IMAGE_PLACEHOLDER = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class BadSample(ValueError):
    """A record that cannot be trained on.

    Args:
        kind: Short name of what is wrong, e.g. ``"missing image"``: what `pmod data check` counts by.
        detail: The particulars.
    """

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind


@dataclass(frozen=True)
class Turn:
    """One message: its role in the chat template, its text, and how many images come with it."""

    role: str
    text: str
    images: int = 0


@dataclass(frozen=True)
class Sample:
    """A record, read strictly.

    Attributes:
        id: The record's own, or its place in the file.
        images: Names relative to the image folder.
        turns: At least one of the user's and one of the assistant's, in turn.
    """

    id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]


def read_records(path: Path) -> list[Any]:
    """Read the records of a JSON list or of a JSON-lines file, without looking into them.

    Raises:
        PmodError: No such file, not JSON, not a list, or empty.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise PmodError(f"no data file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PmodError(f"cannot read {path}: {error}") from error
    try:
        records = _json_lines(text) if path.suffix == ".jsonl" else json.loads(text)
    except json.JSONDecodeError as error:
        raise PmodError(f"{path} is not valid JSON: {error}", "JSON-lines files end in .jsonl") from error
    if not isinstance(records, list):
        raise PmodError(f"{path} is not a list of records", 'expected [{"conversations": [...]}, ...]')
    if not records:
        raise PmodError(f"{path} holds no records")
    return records


def parse_record(record: Any, index: int) -> Sample:
    """Read one record strictly.

    Args:
        record: ``{"id", "image": absent | str | list, "conversations": [{"from", "value"}, ...]}``.
        index: Its place in the file, its id where it has none.

    Raises:
        BadSample: What is wrong with it.
    """
    if not isinstance(record, dict):
        raise BadSample("not a record", f"a {type(record).__name__}")
    images = record.get("image")
    images = [] if images is None else [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(name, str) and name for name in images):
        raise BadSample("bad image field", "absent, a string or a list of strings is expected")
    conversation = record.get("conversations")
    if not isinstance(conversation, list) or not conversation:
        raise BadSample("no conversations")
    turns = tuple(_parse_turn(turn) for turn in conversation)
    spoken = [turn.role for turn in turns[turns[0].role == "system" :]]
    if spoken != ["user", "assistant"] * (len(spoken) // 2) or not spoken:
        raise BadSample("turns out of order", " ".join(spoken) or "no turns")
    placeholders = sum(turn.images for turn in turns)
    if placeholders != len(images):
        raise BadSample("<image> count", f"{placeholders} placeholders, {len(images)} images")
    return Sample(str(record.get("id", index)), tuple(images), turns)


def image_path(folder: Path, name: str) -> Path:
    """Where an image lies, or why it may not be opened.

    Raises:
        BadSample: The name leads out of the folder, by ``..``, an absolute path or a link.
    """
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise BadSample("path leaves the folder", name)
    path = folder / name
    if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
        raise BadSample("path leaves the folder", name)
    return path


def load_image(folder: Path, name: str) -> Image.Image:
    """Open and decode an image as RGB.

    Raises:
        BadSample: It is missing, outside the folder, unreadable, cut short or of no size.
    """
    path = image_path(folder, name)
    try:
        if path.stat().st_size == 0:
            raise BadSample("empty image", name)
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise BadSample("missing image", name) from None
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, BadSample):
            raise
        raise BadSample("unreadable image", f"{name}: {type(error).__name__}") from error


class ConversationData(Sequence[Sample]):
    """The usable records of a data file.

    Args:
        path: The file.
        images: The folder that image names are relative to.

    Attributes:
        bad: (id, reason) of the records left out.
        fingerprint: SHA-256 of the file, to tell on resume whether it is the same.

    Raises:
        PmodError: If the file cannot be read or holds no usable record.
    """

    def __init__(self, path: Path, images: Path) -> None:
        self.path, self.images = path, images
        self.samples: list[Sample] = []
        self.bad: list[tuple[str, str]] = []
        for index, record in enumerate(read_records(path)):
            try:
                self.samples.append(parse_record(record, index))
            except BadSample as error:
                name = record.get("id", index) if isinstance(record, dict) else index
                self.bad.append((str(name), str(error)))
        self.fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()
        if not self.samples:
            raise PmodError(f"{path}: no usable record; the first: {self.bad[0][1]}", "see pmod data check")
        if any(sample.images for sample in self.samples) and not images.is_dir():
            raise PmodError(f"no image folder {images}")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: Any) -> Any:
        return self.samples[index]


def _json_lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _parse_turn(turn: Any) -> Turn:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise BadSample("bad turn", 'expected {"from": ..., "value": ...}')
    role = ROLES.get(turn.get("from", ""))
    if role is None:
        raise BadSample("unknown role", repr(turn.get("from")))
    images = turn["value"].count(IMAGE_PLACEHOLDER)
    if images and role != "user":
        raise BadSample("<image> count", f"a placeholder in a turn of {turn['from']}")
    text = turn["value"].replace(IMAGE_PLACEHOLDER, "").strip()
    if not text and role == "assistant":
        raise BadSample("empty answer")
    return Turn(role, text, images)
