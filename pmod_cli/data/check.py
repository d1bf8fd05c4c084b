"""``pmod data check``: everything that would go wrong with a data file, before hours are spent."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmod_cli.data.dataset import DataSource, open_data
from pmod_cli.data.records import READ, BadSample, Conversation, parse_record, unread_keys
from pmod_cli.families.chat_templates import VIDEO_PLACEHOLDER
from pmod_cli.output.files import check_place
from pmod_cli.pictures import Facts

if TYPE_CHECKING:
    from pmod_cli.data.chat import ChatEncoder

_CHUNK = 256
"""Records that are tokenised together."""
_AHEAD = 4
"""Chunks whose pictures are decoded while one is judged."""


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
        PmodError: The data cannot be read, or ``fix`` exists, cannot be written, or would be empty.
    """
    if fix is not None and not force:
        check_place(fix, force)
    source = open_data(data, images)
    if fix is not None:
        source.check_kind(fix)
        check_place(fix, force, [data, *([images] if images else [])])
    check = _Check(source, processor, max_length, image_position)
    for done in check.run():
        if progress is not None:
            progress(done, len(source.records))
    good, problems = check.good, check.problems
    if fix is not None:
        if not good:
            raise source.none_usable(problems[0]["detail"])
        source.write(good, fix, force=force)
    return {
        "records": len(source.records),
        "good": len(good),
        "with_images": check.with_images,
        "counts": dict(Counter(problem["kind"] for problem in problems).most_common()),
        "problems": problems,
        "notes": dict(check.notes.most_common()),
        "longest_tokens": check.longest,
        "fixed": str(fix) if fix is not None else None,
    }


@dataclass
class _Chunk:
    """Records under examination, with what was read of each, or why it cannot be used."""

    start: int
    records: list[Any]
    samples: list[Conversation | BadSample]
    token_ids: Future[list[list[int]]] | None


class _Check:
    """The check itself: pictures are decoded and texts tokenised in threads, records judged in their order."""

    def __init__(self, source: DataSource, processor: Any, max_length: int, image_position: str) -> None:
        self.source = source
        self.encoder: ChatEncoder | None = None
        if processor is not None:
            from pmod_cli.data.chat import ChatEncoder  # imports transformers

            self.encoder = ChatEncoder(processor, max_length, image_position)
        self.problems: list[dict[str, Any]] = []
        self.good: list[int] = []
        self.with_images = 0
        self.longest: int | None = None
        columns = source.table.column_names if source.table is not None else ()
        self.notes = Counter(
            {f"key {name} is not read": len(source.records) for name in columns if name not in READ}
        )
        self._facts: dict[str, Future[Facts | BadSample] | Facts | BadSample] = {}  # by picture
        self._noted: set[str] = set()  # many records may name one picture
        self._seen: set[bytes] = set()

    def run(self) -> Iterator[int]:
        """Check all records; yields how many are done."""
        waiting: deque[_Chunk] = deque()
        # The tokenizer has its own threads, and is not made to be called from several.
        with ThreadPoolExecutor(_cores()) as self._decoders, ThreadPoolExecutor(1) as self._tokenizer:
            try:
                for start in range(0, len(self.source.records), _CHUNK):
                    waiting.append(self._begin(start))
                    if len(waiting) > _AHEAD:
                        yield self._finish(waiting.popleft())
                while waiting:
                    yield self._finish(waiting.popleft())
            finally:
                self._decoders.shutdown(cancel_futures=True)

    def _begin(self, start: int) -> _Chunk:
        records = self.source.records[start : start + _CHUNK]
        samples = [_read(record, index) for index, record in enumerate(records, start)]
        whole = [sample for sample in samples if isinstance(sample, Conversation)]
        for name in (name for sample in whole for name in sample.images):
            if name not in self._facts:
                self._facts[name] = self._decoders.submit(self._examine, name)
        token_ids = None
        if self.encoder is not None:
            texts = []
            for place, sample in enumerate(samples):
                if isinstance(sample, Conversation):
                    try:
                        texts.append(self.encoder.text(sample.turns))
                    except BadSample as error:
                        samples[place] = error.with_traceback(None)
            token_ids = self._tokenizer.submit(self.encoder.token_ids, texts)
        return _Chunk(start, records, samples, token_ids)

    def _examine(self, name: str) -> Facts | BadSample:
        try:
            return self.source.pictures.examine(name)
        except BadSample as error:
            return BadSample(error.kind, error.detail)  # without the frames that hold the picture

    def _finish(self, chunk: _Chunk) -> int:
        token_ids = iter(chunk.token_ids.result() if chunk.token_ids is not None else ())
        for index, (record, sample) in enumerate(zip(chunk.records, chunk.samples, strict=True), chunk.start):
            try:
                if isinstance(sample, BadSample):
                    raise sample
                self._judge(sample, next(token_ids, []))
                self.notes.update(f"key {unread} is not read" for unread in unread_keys(record))
                if any(VIDEO_PLACEHOLDER in turn.text for turn in sample.turns):
                    self.notes[f"{VIDEO_PLACEHOLDER} is text, and shows none"] += 1
                self.good.append(index)
                self.with_images += bool(sample.images)
            except BadSample as error:
                name = record.get("id", "") if isinstance(record, dict) else ""
                problem = {"index": index, "id": str(name), "kind": error.kind, "detail": str(error)}
                self.problems.append(problem)
        return chunk.start + len(chunk.records)

    def _judge(self, sample: Conversation, token_ids: Sequence[int]) -> None:
        """Note what there is to note of a sample; `BadSample` if it is unfit."""
        key = _digest(sample)
        if key in self._seen:
            raise BadSample("duplicate", "the same image and conversation stand earlier in the file")
        pictures = [self._picture(name) for name in sample.images]
        if self.encoder is not None:
            ids = self.encoder.picture_ids([(picture.width, picture.height) for picture in pictures])
            length = self.encoder.length(sample.turns, token_ids, ids)
            self.longest = max(self.longest or 0, length)
            if self.encoder.moves(sample.turns):
                self.notes["picture moved in front of the words (train.image_position)"] += 1
        for name, picture in zip(sample.images, pictures, strict=True):
            if name not in self._noted:
                self._noted.add(name)
                self.notes.update(f"picture {note}" for note in picture.notes)
        self._seen.add(key)

    def _picture(self, name: str) -> Facts:
        facts = self._facts[name]
        if isinstance(facts, Future):
            facts = self._facts[name] = facts.result()
        if isinstance(facts, BadSample):
            raise BadSample(facts.kind, facts.detail)
        return facts


def _digest(sample: Conversation) -> bytes:
    """Of all but the id."""
    parts = [str(len(sample.images)), *sample.images, *(f"{turn.role} {turn.text}" for turn in sample.turns)]
    return hashlib.blake2b("\0".join(parts).encode(errors="surrogatepass"), digest_size=16).digest()


def _read(record: Any, index: int) -> Conversation | BadSample:
    try:
        return parse_record(record, index)
    except BadSample as error:
        return error.with_traceback(None)


def _cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
