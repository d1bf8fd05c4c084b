"""Files that are whole or not there: written beside their place and renamed into it.

Nothing is replaced or removed that pmod did not write. A folder that it wrote has a `MARKER`, a file has a `TAG`.

A marker may be a stranger's, so it is believed no more than it proves. Of a finished folder it has a digest of each
file; of a `_workspace` the folder's inode; of a folder to work in only whose it is: what pmod puts there its code says.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pmod_cli.output.errors import PmodError
from pmod_cli.output.paths import existing_parent, real_path, user_path
from pmod_cli.output.signals import held

SCHEMA_VERSION = 1
"""Of every result in JSON; it rises when a key is removed or changes its meaning."""

MARKER = ".pmod"
"""The file in a folder that pmod wrote, never a link: JSON with ``files``, ``names`` or ``workspace``."""
TAG = "written by pmod, which may replace it"
"""Stands at the beginning or the end of the pictures and pages that pmod writes."""
BLANK_TAG = " \t \t \n"
"""The same, as the end of the last line of JSON, which can hold nothing else."""

_OPENED: dict[Path, tuple[str, ...]] = {}
"""Folders that this process works in, with patterns of what it puts there."""

_ENDS = 8192
_LARGEST = 64 * 2**20
_JSON_HEAD = re.compile(rb'\{\s*"schema_version": \d+,\s*"command": "')
_AT_FDCWD, _NO_REPLACE, _EXCHANGE = -100, 1, 2  # <linux/fs.h>


def tag(command: str) -> dict[str, Any]:
    """The keys with which a command's result in JSON begins: ``pmod report`` knows it by them."""
    return {"schema_version": SCHEMA_VERSION, "command": command}


def is_ours(path: Path) -> bool:
    """Whether all that stands at a path was written by pmod, or is an empty folder; never true of a link or a device.

    A finished folder's `MARKER` has digests of its files: with anything more or changed in it, it is not ours. A file
    has the `TAG`, is a command's JSON, or lies in a folder that this process works in (`open_folder`), or one below.
    """
    return _is_ours(path, path.parent)


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
    if not _is_ours(path, path.parent, names):
        raise _not_ours(path)


def open_folder(folder: Path, names: Sequence[str]) -> None:
    """Make a folder to work in, or go on in one that pmod made; the folders above it are made too.

    ``names`` are patterns of what pmod puts there; `is_ours` takes the folder for pmod's while it holds nothing else.

    Raises:
        PmodError: There is something else, a finished output of pmod's included; see `check_links`.
    """
    if folder.is_symlink():
        raise PmodError(f"{folder} is a symbolic link", "name the place itself")
    mark = _marked(folder)
    if mark is None and folder.exists() and not (folder.is_dir() and _blank(folder)):
        raise PmodError(f"{folder} holds files that pmod did not write", "choose another folder")
    if mark is not None and not _is_for(mark, names):
        raise PmodError(f"{folder} holds what another command of pmod's wrote", "choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    check_links(folder, names)
    if mark is None:
        _mark(folder, {"names": list(names)})
    _OPENED[real_path(folder)] = tuple(names)


def is_open(folder: Path) -> bool:
    """Whether this process works in a folder: `open_folder`."""
    return real_path(folder) in _OPENED


def check_links(folder: Path, names: Sequence[str]) -> None:
    """Refuse links, pipes and devices among what pmod puts into a folder, however deep: it would write through them.

    So it would through hard links, with which backups are made, of files that it appends to.
    """
    for here, folders, files in os.walk(folder):
        if Path(here) == folder:
            folders[:], files = ([each for each in kind if _fits(each, names)] for kind in (folders, files))
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
                files = sorted(file for file in new.rglob("*") if not file.is_dir())
                _mark(new, {"files": {str(file.relative_to(new)): _digest(file) for file in files}})
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


def remove_unused(folder: Path) -> None:
    """Remove a folder of `open_folder` in which nothing came to be."""
    if [each.name for each in folder.iterdir()] == [MARKER]:
        remove_folder(folder)
        _OPENED.pop(real_path(folder), None)


def to_json(data: Any) -> bytes:
    """JSON as it is written to files."""
    return (json.dumps(data, indent=2) + "\n").encode()


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file in one step; see `replacing`."""
    write_file(path, to_json(data))


def _is_ours(path: Path, home: Path, names: Sequence[str] = ()) -> bool:
    """`is_ours` of what stood in ``home``, wherever it is now; ``names`` as in `check_place`."""
    if path.is_symlink() or os.path.ismount(path):
        return False
    if path.is_dir():
        mark = _marked(path)
        if mark is None:
            return _blank(path)
        if "files" in mark:
            return _is_as_written(path, mark["files"])
        names = names or _OPENED.get(real_path(path), ())
        return _is_for(mark, names) and all(_fits(each.name, (MARKER, *names)) for each in path.iterdir())
    if not path.is_file():
        return False
    if any(_fits(each.name, _OPENED.get(real_path(each.parent), ())) for each in (home / path.name, home)):
        return True
    ends = _ends(path)
    return TAG.encode() in ends or ends.endswith(BLANK_TAG.encode()) or _JSON_HEAD.match(ends) is not None


def _is_as_written(folder: Path, digests: Any) -> bool:
    """Whether a finished folder holds nothing but what its marker has the digests of."""
    if not isinstance(digests, dict):
        return False
    known = {folder / name: digest for name, digest in digests.items() if digest and isinstance(digest, str)}
    above = {parent for file in known for parent in file.parents}
    return all(
        path in above if path.is_dir() and not path.is_symlink() else known.get(path) == _digest(path)
        for path in folder.rglob("*")
        if path != folder / MARKER
    )


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, each) for each in patterns)


def _is_for(mark: dict[str, Any], names: Sequence[str]) -> bool:
    """Whether a marker is of a folder for such names to work in."""
    theirs = mark.get("names")
    return isinstance(theirs, list) and any(name in theirs for name in names)


def _marked(folder: Path) -> dict[str, Any] | None:
    """What a folder's marker says; None without one."""
    try:
        with open(folder / MARKER, "rb", opener=_unfollowed) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST:
                return None
            mark = json.load(file)
    except (OSError, ValueError, RecursionError):
        return None
    return mark if isinstance(mark, dict) and mark.keys() & {"files", "names", "workspace"} else None


def _unfollowed(path: str, flags: int) -> int:
    """An opener: a link is an error, and a pipe is not waited for."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def _ends(path: Path) -> bytes:
    """The beginning and the end of a file."""
    with open(path, "rb", opener=_unfollowed) as file:
        ends = file.read(_ENDS)
        file.seek(max(0, os.fstat(file.fileno()).st_size - _ENDS))
        return ends + file.read()


def _digest(path: Path) -> str:
    """Of a regular file's size and ends, as checkpoints are large; empty of anything else."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        return ""
    return hashlib.blake2b(f"{status.st_size} ".encode() + _ends(path), digest_size=16).hexdigest()


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
            _mark(room, {"workspace": room.stat().st_ino})
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
    mark = _marked(room)
    return _blank(room) if mark is None else mark.get("workspace") == room.stat().st_ino


def _lock(folder: Path, what: Path) -> int:
    """A descriptor that holds the lock on a folder, which is on its marker."""
    lock = None
    try:
        lock = _unfollowed(str(folder / MARKER), os.O_RDWR | os.O_CREAT)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), (folder / MARKER).lstat()):
            return lock
    except (BlockingIOError, FileNotFoundError):  # the latter where who had it has just removed it
        pass
    if lock is not None:
        os.close(lock)
    raise PmodError(f"another pmod is writing {what}", "wait for it, or choose another place")


def _mark(folder: Path, mark: dict[str, Any]) -> None:
    with open(folder / MARKER, "wb", opener=_unfollowed) as file:
        file.write(to_json(mark))


def _blank(folder: Path) -> bool:
    """Whether a folder holds nothing, or only the empty marker of a process that was killed before it wrote more."""
    status = [(each.name, each.lstat()) for each in folder.iterdir()]
    return all(name == MARKER and stat.S_ISREG(at.st_mode) and not at.st_size for name, at in status)


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
