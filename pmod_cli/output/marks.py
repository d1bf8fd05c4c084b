"""How pmod knows what it wrote: a `MARKER` in each of its folders, a `TAG` in each of its files.

A marker may be a stranger's, so it is believed no more than it proves. Of a finished folder it has a digest of each
file; of a folder in which something is made (`pmod_cli.output.files.replacing`) its inode; of a folder to work in only
whose it is: what pmod puts there its code says.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pmod_cli.output.paths import real_path

MARKER = ".pmod"
"""The file in a folder that pmod wrote, never a link: JSON with ``files``, ``names`` or ``workspace``."""
TAG = "written by pmod, which may replace it"
"""Stands at the beginning or the end of the pictures and pages that pmod writes."""
BLANK_TAG = " \t \t \n"
"""The same, as the end of the last line of JSON, which can hold nothing else."""

OPENED: dict[Path, tuple[str, ...]] = {}
"""Folders that this process works in, with patterns of what it puts there."""

_ENDS = 8192
_LARGEST = 64 * 2**20
_JSON_HEAD = re.compile(rb'\{\s*"schema_version": \d+,\s*"command": "')


def is_ours(path: Path, home: Path | None = None, names: Sequence[str] = ()) -> bool:
    """Whether all that stands at a path was written by pmod, or is an empty folder; never true of a link or a device.

    A finished folder's `MARKER` has digests of its files: with anything more or changed in it, it is not ours. A file
    has the `TAG`, is a command's JSON, or lies in a folder that this process works in (`OPENED`), or one below.

    Args:
        path: Where it is now.
        home: The folder where it stood, if that is another.
        names: Patterns of what pmod puts into a folder to work in that this process has not opened.
    """
    home = home or path.parent
    if path.is_symlink() or os.path.ismount(path):
        return False
    if path.is_dir():
        mark = read_mark(path)
        if mark is None:
            return is_blank(path)
        if "files" in mark:
            return _is_as_written(path, mark["files"])
        names = names or OPENED.get(real_path(path), ())
        return is_for(mark, names) and all(fits(each.name, (MARKER, *names)) for each in path.iterdir())
    if not path.is_file():
        return False
    if any(fits(each.name, OPENED.get(real_path(each.parent), ())) for each in (home / path.name, home)):
        return True
    ends = _ends(path)
    return TAG.encode() in ends or ends.endswith(BLANK_TAG.encode()) or _JSON_HEAD.match(ends) is not None


def read_mark(folder: Path) -> dict[str, Any] | None:
    """What a folder's marker says; None without one."""
    try:
        with open(folder / MARKER, "rb", opener=unfollowed) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST:
                return None
            mark = json.load(file)
    except (OSError, ValueError, RecursionError):
        return None
    return mark if isinstance(mark, dict) and mark.keys() & {"files", "names", "workspace"} else None


def write_mark(folder: Path, mark: dict[str, Any]) -> None:
    """Write a folder's marker, through no link; none is left where the disk is full."""
    try:
        with open(folder / MARKER, "wb", opener=unfollowed) as file:
            file.write(json.dumps(mark, indent=2).encode())
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            (folder / MARKER).unlink()
        raise


def mark_finished(folder: Path) -> None:
    """Write into a folder that is whole what its files are."""
    files = sorted(file for file in folder.rglob("*") if not file.is_dir())
    write_mark(folder, {"files": {str(file.relative_to(folder)): _digest(file) for file in files}})


def is_for(mark: dict[str, Any], names: Sequence[str]) -> bool:
    """Whether a marker is of a folder for such names to work in."""
    theirs = mark.get("names")
    return isinstance(theirs, list) and any(name in theirs for name in names)


def is_blank(folder: Path) -> bool:
    """Whether a folder holds nothing, or only the empty marker of a process that was killed before it wrote more."""
    status = [(each.name, each.lstat()) for each in folder.iterdir()]
    return all(name == MARKER and stat.S_ISREG(at.st_mode) and not at.st_size for name, at in status)


def fits(name: str, patterns: Sequence[str]) -> bool:
    """Whether a file's name is of one of the patterns."""
    return any(fnmatch(name, each) for each in patterns)


def unfollowed(path: str, flags: int) -> int:
    """An opener: a link is an error, and a pipe is not waited for."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


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


def _ends(path: Path) -> bytes:
    """The beginning and the end of a file."""
    with open(path, "rb", opener=unfollowed) as file:
        ends = file.read(_ENDS)
        file.seek(max(0, os.fstat(file.fileno()).st_size - _ENDS))
        return ends + file.read()


def _digest(path: Path) -> str:
    """Of a regular file's size and ends, as checkpoints are large; empty of anything else."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        return ""
    return hashlib.blake2b(f"{status.st_size} ".encode() + _ends(path), digest_size=16).hexdigest()
