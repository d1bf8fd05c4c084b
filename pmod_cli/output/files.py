"""Files that are whole or not there: written beside their place and renamed into it.

Nothing is replaced or removed that pmod did not write (`pmod_cli.output.marks`).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pmod_cli.output.errors import PmodError
from pmod_cli.output.marks import (
    MARKER,
    OPENED,
    fits,
    is_blank,
    is_for,
    is_ours,
    mark_finished,
    read_mark,
    unfollowed,
    write_mark,
)  # fmt: skip
from pmod_cli.output.paths import existing_parent, real_path, user_path
from pmod_cli.output.signals import held

SCHEMA_VERSION = 1
"""Of every result in JSON; it rises when a key is removed or changes its meaning."""

_AT_FDCWD, _NO_REPLACE, _EXCHANGE = -100, 1, 2  # <linux/fs.h>


def tag(command: str) -> dict[str, Any]:
    """The keys with which a command's result in JSON begins: ``pmod report`` knows it by them."""
    return {"schema_version": SCHEMA_VERSION, "command": command}


def check_place(
    path: Path, force: bool, inputs: Sequence[str | Path] = (), names: Sequence[str] = ()
) -> None:
    """Refuse a place that cannot or may not be written: with ``force`` what pmod wrote is replaced, nothing else ever.

    ``inputs`` are what the command reads; the place may be none of them, nor hold one. ``names`` are those of
    `open_folder`, for the place of a folder to work in.
    """
    if path.name in ("..", MARKER):
        raise PmodError(f"{path}: {path.name} is no name for it", "choose another")
    if user_path(path) != path:
        raise PmodError(
            f"{path}: the shell left ~ as it is", "it does so in --output=~/x; write the path in full"
        )
    if path.is_symlink():
        raise PmodError(f"{path} is a symbolic link", "name the place itself")
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise PmodError(f"{path} is neither a file nor a folder", "choose another place")
    if not path.exists():
        above = existing_parent(path)
        if not above.is_dir():
            what = "a link that leads nowhere" if above.is_symlink() else "a file"
            raise PmodError(f"{above} is {what}, so {path} cannot be made", "choose another place")
        if not os.access(above, os.W_OK | os.X_OK):
            raise PmodError(f"{above} is not writable", "choose a place you may write")
        return
    if not force:
        raise PmodError(f"{path} exists", "--force replaces it")
    place = real_path(path)
    for other, what in ((Path.cwd(), "the working folder"), *((Path(name), "an input") for name in inputs)):
        other = real_path(other)
        if other.exists() and (place == other or place in other.parents):
            raise PmodError(f"{path} is {what}, or holds it", "choose another place")
    if not is_ours(path, path.parent, names):
        raise _not_ours(path)


def open_folder(folder: Path, names: Sequence[str]) -> None:
    """Make a folder to work in, or go on in one that pmod made; the folders above it are made too.

    ``names`` are patterns of what pmod puts there; `is_ours` takes the folder for pmod's while it holds nothing else.

    Raises:
        PmodError: There is something else, a finished output of pmod's included; see `check_links`.
    """
    if folder.is_symlink():
        raise PmodError(f"{folder} is a symbolic link", "name the place itself")
    mark = read_mark(folder)
    if mark is None and folder.exists() and not (folder.is_dir() and is_blank(folder)):
        raise PmodError(f"{folder} holds files that pmod did not write", "choose another folder")
    if mark is not None and not is_for(mark, names):
        raise PmodError(f"{folder} holds what another command of pmod's wrote", "choose another folder")
    with folders_above(folder / MARKER):
        check_links(folder, names)
        if mark is None:
            write_mark(folder, {"names": list(names)})
    OPENED[real_path(folder)] = tuple(names)


def is_open(folder: Path) -> bool:
    """Whether this process works in a folder: `open_folder`."""
    return real_path(folder) in OPENED


def check_links(folder: Path, names: Sequence[str]) -> None:
    """Refuse links, pipes and devices among what pmod puts into a folder, however deep: it would write through them.

    So it would through hard links, with which backups are made, of files that it appends to.
    """
    for here, folders, files in os.walk(folder):
        if Path(here) == folder:
            folders[:], files = ([each for each in kind if fits(each, names)] for kind in (folders, files))
        for path in (Path(here, name) for name in (*folders, *files)):
            status = path.lstat()
            shared = path.suffix in (".jsonl", ".log") and status.st_nlink > 1
            if shared or stat.S_IFMT(status.st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
                raise PmodError(
                    f"{path} is a link, a pipe or a device", "pmod did not make it; move it yourself"
                )


@contextlib.contextmanager
def folders_above(path: Path) -> Iterator[None]:
    """Make the folders above a path; if the block ends in an error, those that it made and are empty go again."""
    missing = [parent for parent in path.absolute().parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for parent in missing:
                parent.rmdir()
        raise


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

    All of them or none; each place has what it had or the whole of the new at every moment. Folders above are made.
    What stands there is replaced with ``force`` alone, and only if pmod wrote it, as it is at that very moment. What
    killed processes left beside the places is removed first.

    Raises:
        PmodError: See `check_place`; another process writes there.
    """
    with contextlib.ExitStack() as stack:
        for path in paths:
            check_place(path, force)
            stack.enter_context(folders_above(path))
        fresh = [stack.enter_context(_workspace(path)) / path.name for path in paths]
        yield fresh
        for new in fresh:
            if new.is_dir():
                mark_finished(new)
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


def copy_folder(old: Path, new: Path) -> None:
    """Copy a folder with its files; of a full disk the error is the system's, not `shutil.copytree`'s list of all."""
    for folder, _, names in os.walk(old):
        here = new / Path(folder).relative_to(old)
        here.mkdir(exist_ok=True)
        for name in names:
            shutil.copy2(Path(folder, name), here)


def remove_folder(folder: Path) -> None:
    """Remove a folder with all that is in it, if pmod wrote it all; else a `PmodError`."""
    if not is_ours(folder):
        raise _not_ours(folder)
    with held():
        shutil.rmtree(folder, ignore_errors=True)


def remove_unused(folder: Path) -> None:
    """Remove a folder of `open_folder` in which nothing came to be."""
    if [each.name for each in folder.iterdir()] == [MARKER]:
        remove_folder(folder)
        OPENED.pop(real_path(folder), None)


def to_json(data: Any) -> bytes:
    """JSON as it is written to files."""
    return (json.dumps(data, indent=2) + "\n").encode()


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file in one step; see `replacing`."""
    write_file(path, to_json(data))


def _not_ours(path: Path) -> PmodError:
    return PmodError(
        f"{path} was not written by pmod, or not all of it", "it stays as it is; choose another place"
    )


@contextlib.contextmanager
def _workspace(path: Path) -> Iterator[Path]:
    """A folder beside a place, for what will take it; no other process works there at the same time."""
    room = path.with_name(f".{path.name}.partial")
    lock, made = None, False
    try:
        with held():
            with contextlib.suppress(FileExistsError):
                room.mkdir()
                made = True
            if not _is_workspace(room):
                raise PmodError(f"{room} is in the way", "pmod did not write it; move it yourself")
            lock = _lock(room, path)
            for stale in room.iterdir():
                if stale.name != MARKER:
                    _remove(stale)
            write_mark(room, {"workspace": room.stat().st_ino})
        yield room
    finally:
        with held():
            if lock is not None:
                _remove(room)
                os.close(lock)
            elif made:
                with contextlib.suppress(OSError):  # another has it by now
                    room.rmdir()


def _is_workspace(room: Path) -> bool:
    """Whether a folder is a `_workspace`, maybe left by a killed process: no link, and no copy."""
    if room.is_symlink() or not room.is_dir():
        return False
    mark = read_mark(room)
    return is_blank(room) if mark is None else mark.get("workspace") == room.stat().st_ino


def _lock(folder: Path, what: Path) -> int:
    """A descriptor that holds the lock on a folder, which is on its marker."""
    lock = None
    try:
        lock = unfollowed(str(folder / MARKER), os.O_RDWR | os.O_CREAT)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), (folder / MARKER).lstat()):
            return lock
    except (BlockingIOError, FileNotFoundError):  # the latter where who had it has just removed it
        pass
    if lock is not None:
        os.close(lock)
    raise PmodError(f"another pmod is writing {what}", "wait for it, or choose another place")


def _put(pairs: list[tuple[Path, Path]], force: bool) -> None:
    """Move the new into their places, and what stood there to where they were; undone if one cannot be."""
    undo: list[tuple[Path, Path, int]] = []
    try:
        for new, path in pairs:
            how = _EXCHANGE if force and os.path.lexists(path) else _NO_REPLACE
            _rename(new, path, how)
            undo.append((path, new, how))
            if how == _EXCHANGE and not is_ours(new, path.parent):
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
