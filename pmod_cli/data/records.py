"""LLaVA's records: ``conversations`` of ``human`` and ``gpt`` and, maybe, ``image``, read strictly."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from pmod_cli.families.chat_templates import PLACEHOLDER
from pmod_cli.output.errors import PmodError, first_line

_LONGEST = 10**6
"""Characters of a turn; no model reads as many, and tokenizers take seconds and gigabytes for more."""

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_DEEPEST = 100
"""Lists and objects within each other in a record; Python itself gives up at some more."""

READ = {"id", "image", "images", "conversations", "messages", "system"}
"""Keys of a record that `parse_record` looks at."""

_READ_OF_TURN = {"from", "value", "role", "content"}
_ESCAPED = re.compile("[\x85\u2028\u2029\ud800-\udfff]")
_WINDOW = 1 << 20
_LITERAL = 16
_BLANKS = re.compile(r"[ \t\n\r]*")
_HALVES = re.compile("[\ud800-\udfff]")
_OTHER_MEDIA = ("video", "videos", "audio", "audios")
_MEDIA = re.compile(
    r"^data:(image|video|audio)/|\.(jpe?g|png|webp|gif|bmp|tiff?|mp4|avi|mov|mkv|webm|wav|mp3|flac)$", re.I
)


class BadSample(ValueError):
    """A record that cannot be trained on; its ``kind``, e.g. ``missing image``, is what `pmod data check` counts by."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind, self.detail = kind, detail


@dataclass(frozen=True)
class Turn:
    """One message: its role in the chat template, and its text with ``<image>`` where a picture goes."""

    role: str
    text: str

    @property
    def images(self) -> int:
        """How many pictures it has."""
        return self.text.count(PLACEHOLDER)

    @property
    def words(self) -> str:
        """The text without its pictures."""
        return self.text.replace(PLACEHOLDER, "").strip()


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


def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Each record of a JSON list or, by the path's suffix ``.jsonl``, of JSON lines: its text, and what it holds.

    The file is read bit by bit: it may be larger than the memory.

    Raises:
        PmodError: The file is missing, cannot be read, is no such list, or holds nothing.
    """
    read = 0
    try:
        # Only line feeds end a line: strings in JSON may hold U+2028, which ends one for others.
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for text, record in _lines(file) if is_lines(path) else _items(file):
                if text.count("[") + text.count("{") > _DEEPEST and too_deep(record):
                    raise ValueError(f"more than {_DEEPEST} lists within each other")
                yield text, record
                read += 1
    except FileNotFoundError:
        raise PmodError(f"no data file {path}") from None
    except OSError as error:
        raise PmodError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PmodError(f"cannot read {path}: after {read} records: {error}") from error
    except _NoListError:
        raise PmodError(
            f"{path} is not a list of records",
            'expected [{"conversations": [...]}, ...]; JSON-lines files end in .jsonl',
        ) from None
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", first_line(error))
        raise PmodError(
            f"{path} is not valid JSON: record {read}: {reason}", "JSON-lines files end in .jsonl"
        ) from error
    if not read:
        raise PmodError(f"{path} holds no records")


def too_deep(value: Any) -> bool:
    """Whether a value of JSON holds more lists within each other than any record does."""
    level = [value]
    for _ in range(_DEEPEST):
        within = [
            each.values() if isinstance(each, dict) else each
            for each in level
            if isinstance(each, dict | list)
        ]
        level = [value for values in within for value in values]
    return bool(level)


class _NoListError(ValueError):
    pass


def _lines(file: TextIO) -> Iterator[tuple[str, Any]]:
    for line in file:
        if text := line.strip():
            yield text, json.loads(text)


def _items(file: TextIO) -> Iterator[tuple[str, Any]]:
    """The items of a JSON list, with a window on the file that grows to the largest item."""
    decode = json.JSONDecoder().raw_decode
    window, at = "", 0

    def read_on() -> bool:
        nonlocal window, at
        more = file.read(max(_WINDOW, len(window) - at))
        window, at = window[at:] + more, 0
        return bool(more)

    def next_sign() -> str:
        nonlocal at
        while True:
            at = _BLANKS.match(window, at).end()  # type: ignore[union-attr]  # matches no blank, too
            if at < len(window) or not read_on():
                return window[at : at + 1]

    if next_sign() != "[":
        raise _NoListError
    at += 1
    more = next_sign() != "]"
    while more:
        next_sign()
        while True:
            try:
                value, end = decode(window, at)
            except ValueError as error:
                # Where the window's end is the cause, the error is there, or says that a string has no end.
                cut = getattr(error, "pos", 0) > len(window) - _LITERAL
                if (cut or str(error).startswith("Unterminated")) and read_on():
                    continue
                raise
            if end < len(window) or not read_on():  # a number may go on
                break
        yield window[at:end], value
        at = end
        more = next_sign() == ","
        at += more
    if next_sign() != "]":
        raise ValueError("expecting a comma, or a bracket at the end")
    at += 1
    if next_sign():
        raise ValueError("extra data after the list")


def dump_records(records: Iterable[Any], path: Path) -> Iterator[str]:
    """The text, piece by piece, of a file that `read_records` reads: one record per line; without the end of the last.

    What other programs take for the end of a line, and halves of surrogate pairs, are escaped.
    """
    texts = (_ESCAPED.sub(_escape, json.dumps(record, ensure_ascii=False)) for record in records)
    lines = is_lines(path)
    gap = "" if lines else "[\n"
    for text in texts:
        yield gap + text
        gap = "\n" if lines else ",\n"
    if not lines:
        yield "\n]"


def _escape(character: re.Match[str]) -> str:
    return f"\\u{ord(character[0]):04x}"


def is_lines(path: Path) -> bool:
    """Whether a file holds JSON lines, by its suffix."""
    return path.suffix.lower() == ".jsonl"


def parse_record(record: Any, index: int) -> Conversation:
    """Read one record strictly, else `BadSample`; ``index`` is its id if it has none of its own.

    It is ``{"id", "image": absent | str | list, "conversations": [{"from", "value"}, ...]}``; ``images``,
    ``messages`` of ``role`` and ``content``, and ``system`` are read too. A ``content`` may be a list of parts of
    ``type`` ``text`` or ``image``, which may name their pictures.
    """
    if not isinstance(record, dict):
        raise BadSample("not a record", f"a {type(record).__name__}")
    if media := [key for key in _OTHER_MEDIA if record.get(key)]:
        raise BadSample("other media", f"the key {media[0]}; training takes pictures (image) and text only")
    conversation = record.get("conversations") or record.get("messages")
    if not isinstance(conversation, list) or not conversation:
        raise BadSample("no conversations")
    images = picture_names(record)
    turns = tuple(map(_parse_turn, conversation))
    if system := record.get("system"):
        turns = (_parse_turn({"from": "system", "value": system}), *turns)
    spoken = [turn.role for turn in turns[turns[0].role == "system" :]]
    if spoken != ["user", "assistant"] * (len(spoken) // 2) or not spoken:
        raise BadSample("turns out of order", " ".join(spoken) or "no turns")
    if not images and (key := next((key for key, value in _unread(record) if _names_media(value)), None)):
        raise BadSample("other media", f"the key {key} names media, and is not read; pictures go into image")
    placeholders = sum(turn.images for turn in turns)
    if placeholders != len(images):
        raise BadSample("<image> count", f"{placeholders} placeholders, {len(images)} images")
    name = record.get("id")
    return Conversation(str(index if name is None else name), tuple(images), turns)


def picture_names(record: dict[str, Any]) -> list[str]:
    """What a record has under ``image`` or ``images``, or in the parts of its turns.

    `BadSample` if it is in several places, or is none of a picture's names.
    """
    given = [record[key] for key in ("image", "images") if record.get(key) not in (None, [], "")]
    parts = [_name_in(part) for turn in _turns(record) for part in _parts(turn) if part.get("type") != "text"]
    if any(name is not None for name in parts):
        given.append(parts)
    if len(given) > 1:
        raise BadSample("bad image field", "pictures in several places: image, images or parts of turns")
    images = given[0] if given else []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(name, str) and name for name in images):
        raise BadSample("bad image field", "absent, a string or a list of strings is expected")
    return images


def unread_keys(record: dict[str, Any]) -> set[str]:
    """Keys of a record and of its turns that `parse_record` does not look at."""
    return {key for key, _ in _unread(record)}


def _unread(record: dict[str, Any]) -> list[tuple[str, Any]]:
    read = READ - {"messages"} if record.get("conversations") else READ
    pairs = [(key, value) for key, value in record.items() if key not in read]
    pairs += [
        (key, value) for turn in _turns(record) for key, value in turn.items() if key not in _READ_OF_TURN
    ]
    return [(str(key), value) for key, value in pairs]


def _names_media(value: Any) -> bool:
    """Whether a value is the name of a picture, a video or a sound, or a list of some."""
    values = [value]
    while values:
        each = values.pop()
        if isinstance(each, (list, tuple)):
            values += each
        elif isinstance(each, str) and _MEDIA.search(each):
            return True
    return False


def _turns(record: dict[str, Any]) -> list[dict[str, Any]]:
    turns = record.get("conversations") or record.get("messages")
    return [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []


def _parts(turn: dict[str, Any]) -> list[dict[str, Any]]:
    content = turn.get("value", turn.get("content"))
    return [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []


def _name_in(part: dict[str, Any]) -> Any:
    """The name that an image part has; None if the record's ``images`` has it."""
    name = next((part[key] for key in ("image", "path", "url", "image_url") if part.get(key)), None)
    return name.get("url") if isinstance(name, dict) else name


def _parse_turn(turn: Any) -> Turn:
    role = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
    value = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
    if isinstance(value, list):
        value = "".join(map(_written, value))
    if not isinstance(value, str):
        raise BadSample("bad turn", 'expected {"from": ..., "value": text} or {"role": ..., "content": text}')
    if str(role or "") not in ROLES:
        raise BadSample("unknown role", repr(role))
    role = ROLES[str(role)]
    if _HALVES.search(value):
        raise BadSample("bad turn", "half of a surrogate pair, which is no text")
    if len(value) > _LONGEST:
        raise BadSample("bad turn", f"{len(value):,} characters, which cannot be meant")
    if PLACEHOLDER in value and role != "user":
        raise BadSample("<image> count", f"a placeholder in a turn of {role}")
    # The first line of an answer may be indented: code is.
    text = re.sub(r"\A(?:[^\S\n]*\n)+", "", value).rstrip() if role == "assistant" else value.strip()
    if not text.strip() and role == "assistant":
        raise BadSample("empty answer")
    return Turn(role, text)


def _written(part: Any) -> str:
    """One part of a turn's content as text."""
    if isinstance(part, dict) and part.get("type") in ("image", "image_url"):
        return PLACEHOLDER
    if isinstance(part, dict) and isinstance(part.get("text"), str) and part.get("type") in (None, "text"):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise BadSample("other media", f"a part of type {kind}; training takes image and text only")
