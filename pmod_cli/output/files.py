"""Files that are whole or not there: written beside their place and renamed into it.

Nothing is replaced or removed that pmod did not write. A folder that it wrote has a `MARKER`, a file has a `TAG`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pmod_cli.output.errors import PmodError
from pmod_cli.output.paths import real_path
from pmod_cli.output.reading import read_json
from pmod_cli.output.signals import held

SCHEMA_VERSION = 1
"""Of every result in JSON; it rises when a key is removed or changes its meaning."""

MARKER = ".pmod"
"""The file in a folder that pmod wrote; it names what is in there."""
TAG = "written by pmod, which may replace it"
"""Stands at the beginning or the end of the pictures and pages that pmod writes."""
BLANK_TAG = " \t \t \n"
"""The same, as the end of the last line of JSON, which can hold nothing else."""

_ENDS = 8192
_JSON_HEAD = re.compile(rb'\{\s*"schema_version": \d+,\s*"command": "')
_AT_FDCWD, _NO_REPLACE, _EXCHANGE = -100, 1, 2  # <linux/fs.h>


def tag(command: str) -> dict[str, Any]:
    """The keys with which a command's result in JSON begins: ``pmod report`` knows it by them."""
    return {"schema_version": SCHEMA_VERSION, "command": command}


def is_ours(path: Path) -> bool:
    """Whether all that stands at a path was written by pmod, or is an empty folder; never true of a link or a device.

    A folder says so in its `MARKER`, which names what pmod put there: with anything more in it, it is not ours. A file
    has the `TAG`, is a command's JSON, or lies in a folder that pmod works in, or one below.
    """
    return _is_ours(path, path.parent)


def check_place(path: Path, force: bool, inputs: Sequence[str | Path] = ()) -> None:
    """Refuse a place that may not be written: with ``force`` what pmod wrote is replaced, nothing else ever.

    ``inputs`` are what the command reads; the place may be none of them, nor hold one.
    """
    if path.is_symlink():
        raise PmodError(f"{path} is a symbolic link", "name the place itself")
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise PmodError(f"{path} is neither a file nor a folder", "choose another place")
    if not path.exists():
        return
    if not force:
        raise PmodError(f"{path} exists", "--force replaces it")
    place = real_path(path)
    for other, what in ((Path.cwd(), "the working folder"), *((Path(name), "an input") for name in inputs)):
        other = real_path(other)
        if other.exists() and (place == other or place in other.parents):
            raise PmodError(f"{path} is {what}, or holds it", "choose another place")
    if not is_ours(path):
        raise _not_ours(path)


def open_folder(folder: Path, names: Sequence[str] = ("*",)) -> None:
    """Make a folder to work in, or go on in one that pmod made; the folders above it are made too.

    ``names`` are patterns of what pmod puts there; `is_ours` takes the folder for pmod's while it holds nothing else.

    Raises:
        PmodError: There is something else, a finished output of pmod's included.
    """
    mark = _marked(folder)
    if mark is None and folder.exists() and not (folder.is_dir() and is_ours(folder)):
        raise PmodError(f"{folder} holds files that pmod did not write", "choose another folder")
    if mark is not None and not set(names) & set(mark.get("names", ())):
        raise PmodError(f"{folder} holds what another command of pmod's wrote", "choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    if mark is None:
        _mark(folder, {"names": list(names)})


@contextlib.contextmanager
def locked(folder: Path, what: Path) -> Iterator[None]:
    """While it lasts no other process gets this lock on a folder; it goes with the process.

    Raises:
        PmodError: Another has it, and so writes ``what``.
    """
    lock = _lock(folder, what)
    try:
        yield
    finally:
        os.close(lock)


@contextlib.contextmanager
def replacing_all(paths: Sequence[Path], *, force: bool = True) -> Iterator[list[Path]]:
    """Yields paths to make files or folders at; they take these places if the block ends without an error.

    All of them or none; each place, whose folder must exist, has what it had or the whole of the new at every moment.
    What stands there is replaced with ``force`` alone, and only if pmod wrote it, as it is at that very moment. What
    killed processes left beside the places is removed first.

    Raises:
        PmodError: See `check_place`; no such folder; another process writes there.
    """
    for path in paths:
        if not path.parent.is_dir():
            raise PmodError(f"no folder {path.parent}")
        check_place(path, force)
    with contextlib.ExitStack() as stack:
        fresh = [stack.enter_context(_workspace(path)) / path.name for path in paths]
        yield fresh
        for new in fresh:
            if new.is_dir():
                files = [str(file.relative_to(new)) for file in new.rglob("*") if not file.is_dir()]
                _mark(new, {"files": sorted(files)})
        with held():
            _put(list(zip(fresh, paths, strict=True)), force)


@contextlib.contextmanager
def replacing(path: Path, *, force: bool = True) -> Iterator[Path]:
    """`replacing_all` of one place."""
    with replacing_all([path], force=force) as [fresh]:
        yield fresh


def write_file(path: Path, content: bytes | str, *, force: bool = True) -> None:
    """Write a file in one step, text as UTF-8; see `replacing_all`."""
    with replacing(path, force=force) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def check_output(
    path: Path, what: str, suffixes: Sequence[str], force: bool, inputs: Sequence[str | Path] = ()
) -> None:
    """Refuse a file that cannot be written; called before the work, so that none of it is lost.

    Raises:
        PmodError: Another suffix, a folder, a folder that does not exist; and see `check_place`.
    """
    if path.suffix.lower() not in suffixes:
        raise PmodError(f"cannot write {what} to {path}", f"name a {' or '.join(suffixes)} file")
    if path.is_dir():
        raise PmodError(f"{path} is a folder")
    if not path.absolute().parent.is_dir():
        raise PmodError(f"no folder {path.parent}")
    check_place(path, force, inputs)


def remove_folder(folder: Path) -> None:
    """Remove a folder with all that is in it, if pmod wrote it all; else a `PmodError`."""
    if not is_ours(folder):
        raise _not_ours(folder)
    with held():
        shutil.rmtree(folder, ignore_errors=True)


def to_json(data: Any) -> bytes:
    """JSON as it is written to files."""
    return (json.dumps(data, indent=2) + "\n").encode()


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file in one step; see `replacing`."""
    write_file(path, to_json(data))


def _is_ours(path: Path, home: Path) -> bool:
    """`is_ours` of what stood in ``home``, wherever it is now."""
    if path.is_symlink() or os.path.ismount(path):
        return False
    if path.is_dir():
        mark = _marked(path)
        if mark is None:
            return not _fuller(path)
        if "names" in mark:
            return all(each.name == MARKER or _lists(path, each.name) for each in path.iterdir())
        known = {MARKER, *mark["files"]}
        return all(file.is_dir() or str(file.relative_to(path)) in known for file in path.rglob("*"))
    if not path.is_file():
        return False
    if path.name == MARKER or _lists(home, path.name) or _lists(home.parent, home.name):
        return True
    with path.open("rb") as file:
        ends = file.read(_ENDS)
        file.seek(max(0, path.stat().st_size - _ENDS))
        ends += file.read()
    return TAG.encode() in ends or ends.endswith(BLANK_TAG.encode()) or _JSON_HEAD.match(ends) is not None


def _lists(folder: Path, name: str) -> bool:
    """Whether a folder that pmod works in says that it puts such a name there."""
    return any(fnmatch(name, each) for each in (_marked(folder) or {}).get("names", ()))


def _marked(folder: Path) -> dict[str, Any] | None:
    """What a folder's marker says; None without one."""
    try:
        mark = read_json(folder / MARKER)
    except PmodError:
        return None
    lists = [mark[key] for key in ("names", "files") if key in mark]
    known = lists and all(
        isinstance(each, list) and all(isinstance(name, str) for name in each) for each in lists
    )
    return mark if known else None


def _not_ours(path: Path) -> PmodError:
    return PmodError(
        f"{path} was not written by pmod, or not all of it", "it stays as it is; choose another place"
    )


@contextlib.contextmanager
def _workspace(path: Path) -> Iterator[Path]:
    """A folder beside a place, for what will take it; no other process works there at the same time."""
    room = path.with_name(f".{path.name}.partial")
    lock = None
    try:
        with held():
            room.mkdir(exist_ok=True)
            if _marked(room) is None and _fuller(room):
                raise PmodError(f"{room} is in the way", "pmod did not write it; move it yourself")
            lock = _lock(room, path)
            for stale in room.iterdir():
                if stale.name != MARKER:
                    _remove(stale)
            _mark(room, {"names": ["*"]})
        yield room
    finally:
        if lock is not None:
            with held():
                _remove(room)
                os.close(lock)


def _lock(folder: Path, what: Path) -> int:
    """A descriptor that holds the lock on a folder, which is on its marker."""
    lock = None
    try:
        lock = os.open(folder / MARKER, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), (folder / MARKER).stat()):
            return lock
    except (BlockingIOError, FileNotFoundError):  # the latter where who had it has just removed it
        pass
    if lock is not None:
        os.close(lock)
    raise PmodError(f"another pmod is writing {what}", "wait for it, or choose another place")


def _mark(folder: Path, mark: dict[str, Any]) -> None:
    (folder / MARKER).write_bytes(to_json(mark))


def _fuller(folder: Path) -> bool:
    """Whether a folder holds more than a marker."""
    return any(each.name != MARKER for each in folder.iterdir())


def _put(pairs: list[tuple[Path, Path]], force: bool) -> None:
    """Move the new into their places, and what stood there to where they were; undone if one cannot be."""
    undo: list[tuple[Path, Path, int]] = []
    try:
        for new, path in pairs:
            how = _EXCHANGE if force and os.path.lexists(path) else _NO_REPLACE
            _rename(new, path, how)
            undo.append((path, new, how))
            if how == _EXCHANGE and not _is_ours(new, path.parent):
                raise _not_ours(path)
    except BaseException as error:
        for step in reversed(undo):
            _rename(*step)
        if isinstance(error, FileExistsError):
            raise PmodError(f"{error.filename2} appeared while pmod worked", "it stays as it is") from None
        raise


def _rename(old: Path, new: Path, how: int) -> None:
    """Rename to a free place or swap two, in one step where the system can (Linux's renameat2)."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        if not renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), how):
            return
        code = ctypes.get_errno()
        if code not in (errno.ENOSYS, errno.EINVAL):
            raise OSError(code, os.strerror(code), str(old), None, str(new))
    if how == _EXCHANGE:
        aside = old.with_name(old.name + "-replaced")
        new.rename(aside)
        old.rename(new)
        aside.rename(old)
    elif os.path.lexists(new):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(old), None, str(new))
    else:
        old.rename(new)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
