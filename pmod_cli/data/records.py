"""LLaVA's records: ``conversations`` of ``human`` and ``gpt`` and, maybe, ``image``, read strictly."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmod_cli.output.errors import PmodError

IMAGE_PLACEHOLDER = "<image>"
_LONGEST = 10**6
"""Characters of a turn; no model reads as many, and tokenizers take seconds and gigabytes for more."""

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class BadSample(ValueError):
    """A record that cannot be trained on; its ``kind``, e.g. ``missing image``, is what `pmod data check` counts by."""

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
class Conversation:
    """A record, read strictly.

    Attributes:
        id: The record's own, or its place in the file.
        images: Names by which `Pictures` finds them: relative to the image folder, or rows of a table.
        turns: The user's and the assistant's alternate, at least one of each; a system turn may come first.
    """

    id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]


def parse_json(content: bytes, path: Path) -> list[Any]:
    """The records of a JSON list or, by the path's suffix ``.jsonl``, of JSON lines, without looking into them."""
    try:
        text = content.decode("utf-8")
        if path.suffix == ".jsonl":
            # Not splitlines: strings in JSON may hold U+2028, which ends a line for Python.
            records = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            records = json.loads(text)
    except UnicodeDecodeError as error:
        raise PmodError(f"cannot read {path}: {error}") from error
    except (ValueError, RecursionError) as error:  # the latter where it is deep
        raise PmodError(f"{path} is not valid JSON: {error}", "JSON-lines files end in .jsonl") from error
    if not isinstance(records, list):
        raise PmodError(f"{path} is not a list of records", 'expected [{"conversations": [...]}, ...]')
    if not records:
        raise PmodError(f"{path} holds no records")
    return records


def parse_record(record: Any, index: int) -> Conversation:
    """Read one record strictly, else `BadSample`; ``index`` is its id if it has none of its own.

    It is ``{"id", "image": absent | str | list, "conversations": [{"from", "value"}, ...]}``.
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
    return Conversation(str(record.get("id", index)), tuple(images), turns)


def _parse_turn(turn: Any) -> Turn:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise BadSample("bad turn", 'expected {"from": ..., "value": ...}')
    role = ROLES.get(str(turn.get("from", "")))
    if role is None:
        raise BadSample("unknown role", repr(turn.get("from")))
    if any("\ud800" <= character <= "\udfff" for character in turn["value"]):
        raise BadSample("bad turn", "half of a surrogate pair, which is no text")
    if len(turn["value"]) > _LONGEST:
        raise BadSample("bad turn", f"{len(turn['value']):,} characters, which cannot be meant")
    images = turn["value"].count(IMAGE_PLACEHOLDER)
    if images and role != "user":
        raise BadSample("<image> count", f"a placeholder in a turn of {turn['from']}")
    text = turn["value"].replace(IMAGE_PLACEHOLDER, "").strip()
    if not text and role == "assistant":
        raise BadSample("empty answer")
    return Turn(role, text, images)
