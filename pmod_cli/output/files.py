"""Files that are whole or not there: written beside their place and renamed into it. Read with one-line errors."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pmod_cli.output.errors import PmodError, first_line

SCHEMA_VERSION = 1
"""Of every result in JSON; it rises when a key is removed or changes its meaning."""

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # <linux/fs.h>


def cache_folder() -> Path:
    """Where pmod keeps what it would otherwise make again: ``PMOD_CACHE``, or ``pmod`` in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PMOD_CACHE") or Path(cache, "pmod")).expanduser()


def tag(command: str) -> dict[str, Any]:
    """The keys with which a command's result in JSON begins: ``pmod report`` knows it by them."""
    return {"schema_version": SCHEMA_VERSION, "command": command}


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path beside a place, to make a file or folder at; it takes the place if the block ends without an error.

    The place, whose folder must exist, has what it had or the whole of the new at every moment. What killed processes
    left beside it is removed first.

    Raises:
        PmodError: The folder of the place does not exist.
    """
    if not path.parent.is_dir():
        raise PmodError(f"no folder {path.parent}")
    _sweep(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        if partial.is_dir() and path.is_dir():
            _exchange(partial, path)
        else:
            partial.replace(path)
    finally:
        _remove(partial)


def write_file(path: Path, content: bytes | str) -> None:
    """Write a file in one step, text as UTF-8; see `replacing`."""
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def check_output(path: Path, what: str, suffixes: Sequence[str], force: bool) -> None:
    """Refuse a file that cannot be written; called before the work, so that none of it is lost.

    Raises:
        PmodError: Another suffix, a folder, a place that does not exist, or a file that does, without ``force``.
    """
    if path.suffix.lower() not in suffixes:
        raise PmodError(f"cannot write {what} to {path}", f"name a {' or '.join(suffixes)} file")
    if path.is_dir():
        raise PmodError(f"{path} is a folder")
    if not path.absolute().parent.is_dir():
        raise PmodError(f"no folder {path.parent}")
    if path.exists() and not force:
        raise PmodError(f"{path} exists", "--force replaces it")


def to_json(data: Any) -> bytes:
    """JSON as it is written to files."""
    return (json.dumps(data, indent=2) + "\n").encode()


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file in one step; see `replacing`."""
    write_file(path, to_json(data))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that should hold an object; `PmodError` if it cannot be read or holds something else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PmodError(f"cannot read {path}: {first_line(error)}") from error
    if not isinstance(data, dict):
        raise PmodError(f"cannot read {path}: not a JSON object")
    return data


def read_json_lines(path: Path) -> list[Any]:
    """The values of a JSON Lines file that is written to as work goes on; none where there is no file.

    A line that a kill cut off is left out.
    """
    rows: list[Any] = []
    if not path.is_file():
        return rows
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return rows


def _sweep(path: Path) -> None:
    """Remove what processes that are gone left beside a place."""
    name = re.compile(rf"\.{re.escape(path.name)}\.(\d+)\.partial(-replaced)?")
    for other in path.parent.iterdir():
        if (match := name.fullmatch(other.name)) and not _alive(int(match[1])):
            _remove(other)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return process != os.getpid()


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders, in one step where the system can (Linux's renameat2), else in renames."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None and not renameat2(
        _AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE
    ):
        return
    aside = new.with_name(new.name + "-replaced")
    old.rename(aside)
    new.rename(old)
    aside.rename(new)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
