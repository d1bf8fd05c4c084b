"""Puts a checkpoint in place: its files are made in a folder beside it, which then takes its name in one step."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from pmod_cli.checkpoints.shards import CHUNK, StoredTensor, write_shard
from pmod_cli.output.errors import PmodError
from pmod_cli.output.files import check_place, replacing
from pmod_cli.output.paths import existing_parent
from pmod_cli.output.units import size

Progress = Callable[[int], None]
"""Called with a number of bytes each time that many more are in place."""


def check_destination(
    destination: Path, source: Path | None, force: bool, inputs: Iterable[str | Path | None] = ()
) -> None:
    """Refuse a destination before any work is done.

    With ``force`` what pmod wrote there may be replaced, nothing else ever. The source may neither hold it nor lie in
    it; no other input, if one is given, may lie in it.
    """
    path = destination.resolve()
    if source is not None:
        origin = source.resolve()
        if path == origin:
            raise PmodError(f"source and destination are the same folder: {destination}")
        if origin in path.parents or path in origin.parents:
            raise PmodError(f"{destination} and the source lie one inside the other", "choose another place")
    if destination.is_file():
        raise PmodError(f"{destination} exists and is not a folder")
    check_place(destination, force, [each for each in inputs if each is not None])


def free_space(destination: Path) -> int:
    """Bytes free where a destination will be."""
    return shutil.disk_usage(existing_parent(destination)).free


def check_space(destination: Path, needed: int) -> None:
    """Refuse ``needed`` bytes that do not fit on the destination's disk."""
    free = free_space(destination)
    if needed > free:
        raise PmodError(
            f"{destination} needs {size(needed)}, {size(needed - free)} more than are free",
            "free some space or choose another disk",
        )


def write_checkpoint(
    destination: Path,
    weights: Mapping[str, Path | Sequence[StoredTensor]],
    files: Mapping[str, Path | bytes],
    *,
    copy: bool = False,
    force: bool = True,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Write a checkpoint; its folder appears whole or not at all.

    Args:
        destination: Its folder.
        weights: Its weight files by name: a file to link, or tensors to write.
        files: Every other file by name: one to copy, or its contents.
        copy: Copy weights where links would do.
        force: Replace what pmod wrote there.
        progress: See `Progress`.

    Returns:
        How many weight files are a ``hard link``, a ``copy`` or ``written``.
    """
    destination = destination.absolute()
    progress = progress or (lambda count: None)
    methods: Counter[str] = Counter()
    with replacing(destination, force=force) as folder:
        folder.mkdir()
        for name, content in weights.items():
            if isinstance(content, Path):
                methods[place(content.resolve(), folder / name, copy, progress)] += 1
            else:
                write_shard(folder / name, content, progress)
                methods["written"] += 1
        for name, file in files.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(file if isinstance(file, bytes) else file.read_bytes())
    return dict(methods)


def place(source: Path, target: Path, copy: bool, progress: Progress) -> str:
    """Put a large file in place by a hard link; by copying it where that cannot be done or is asked for."""
    if not copy:
        try:
            os.link(source, target)
        except OSError:  # another file system, or one without links; what else is wrong shows in copying
            pass
        else:
            progress(source.stat().st_size)
            return "hard link"
    check_space(target, source.stat().st_size)
    with source.open("rb") as reader, target.open("wb") as writer:
        while chunk := reader.read(CHUNK):
            writer.write(chunk)
            progress(len(chunk))
    return "copy"
