"""Puts a checkpoint in place: everything is made in a folder beside it, which then takes its name in one step."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import glob
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pmod_cli.checkpoints.shards import StoredTensor, write_shard
from pmod_cli.output.errors import PmodError

Progress = Callable[[int], None]
"""Called with a number of bytes each time that many more are in place."""

_LOCK = ".lock"
_FICLONE = 0x40049409  # <linux/fs.h>
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # <linux/fs.h>


def check_destination(destination: Path, source: Path | None, force: bool) -> None:
    """Refuse a destination before any work is done.

    Args:
        destination: The folder to be.
        source: The folder read from.
        force: Whether a checkpoint that is there may be replaced.

    Raises:
        PmodError: It exists, is the source, lies inside it or holds it, is no checkpoint, or cannot be written.
    """
    place = destination.resolve()
    if source is not None:
        origin = source.resolve()
        if place == origin:
            raise PmodError(f"source and destination are the same folder: {destination}")
        if origin in place.parents or place in origin.parents:
            raise PmodError(
                f"{destination} and the source lie one inside the other", "choose another destination"
            )
    if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
        raise PmodError(f"{destination} exists and is not a folder")
    if destination.is_dir():
        if any(destination.iterdir()) and not (destination / "config.json").is_file():
            raise PmodError(f"{destination} exists and is not a checkpoint", "it will not be replaced")
        if not force:
            raise PmodError(f"{destination} exists", "--force replaces it")
    above = existing_parent(destination)
    if not above.is_dir():
        raise PmodError(f"{above} is a file, so {destination} cannot be made")
    if not os.access(above, os.W_OK | os.X_OK):
        raise PmodError(f"{above} is not writable", "choose a place you may write")


def existing_parent(path: Path) -> Path:
    """The nearest folder above a path that exists."""
    return next(parent for parent in path.absolute().parents if parent.exists())


def free_space(destination: Path) -> int:
    """Bytes free where a destination will be."""
    return shutil.disk_usage(existing_parent(destination)).free


def check_space(destination: Path, needed: int) -> None:
    """Refuse what does not fit on the disk.

    Raises:
        PmodError: It does not.
    """
    free = free_space(destination)
    if needed > free:
        raise PmodError(
            f"{destination} needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free",
            "free some space or choose another disk",
        )


def link_is_possible(file: Path, destination: Path) -> bool:
    """Whether a hard link from the destination to a file can be expected: they are on one file system."""
    return existing_parent(file).stat().st_dev == existing_parent(destination).stat().st_dev


class Staging:
    """A folder beside the destination, in a ``with`` block; `commit` gives it the destination's name.

    Whatever happens before `commit`, the destination is as it was. A folder left by a process that was killed is
    removed by the next conversion to the same place.

    Args:
        destination: The folder to be.
        progress: See `Progress`.
    """

    def __init__(self, destination: Path, progress: Progress | None = None) -> None:
        self.destination = destination.absolute()
        self.progress: Progress = progress or (lambda _: None)
        self.methods: Counter[str] = Counter()

    def __enter__(self) -> Staging:
        parent = self.destination.parent
        parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{self.destination.name}.pmod-"
        for stale in parent.glob(glob.escape(prefix) + "*"):
            with contextlib.suppress(OSError), _lock(stale):
                shutil.rmtree(stale)
        self.folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        self._open = contextlib.ExitStack()
        # Where the file system has no locks, what a killed run leaves has to be removed by hand.
        with contextlib.suppress(OSError):
            self._open.enter_context(_lock(self.folder))
        umask = os.umask(0)
        os.umask(umask)
        self.folder.chmod(0o777 & ~umask)
        return self

    def __exit__(self, *error: object) -> None:
        # After `commit` this holds what was replaced, or nothing.
        shutil.rmtree(self.folder, ignore_errors=True)
        self._open.close()

    def write(self, name: str, file: Path | bytes) -> None:
        """Write a small file, or copy it."""
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(file if isinstance(file, bytes) else file.read_bytes())

    def write_shard(self, name: str, tensors: Sequence[StoredTensor]) -> None:
        """Write a safetensors file, streamed."""
        write_shard(self.folder / name, tensors, self.progress)
        self.methods["written"] += 1

    def place(self, name: str, source: Path, copy: bool = False) -> None:
        """Put a large file in place at the least cost: hard link, else reflink, else copy.

        Args:
            name: Its name in the checkpoint.
            source: The file; of a symbolic link, what it points to.
            copy: Make a real copy in any case.
        """
        source, target = source.resolve(), self.folder / name
        size = source.stat().st_size
        if not copy and _hard_link(source, target):
            self.methods["hard link"] += 1
        elif not copy and _reflink(source, target):
            self.methods["reflink"] += 1
        else:
            check_space(self.destination, size)
            with source.open("rb") as reader, target.open("wb") as writer:
                while chunk := reader.read(1 << 24):
                    writer.write(chunk)
                    self.progress(len(chunk))
            self.methods["copy"] += 1
            return
        self.progress(size)

    def commit(self) -> None:
        """Give the folder the destination's name; what was there is removed afterwards."""
        (self.folder / _LOCK).unlink(missing_ok=True)
        if self.destination.exists():
            _exchange(self.folder, self.destination)
        else:
            self.folder.rename(self.destination)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold a folder: the lock goes when the process does, however it ends.

    Raises:
        OSError: Another process holds it, or its file system has no locks.
    """
    # Open for writing: NFS locks nothing else.
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _hard_link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except (
        OSError
    ):  # another file system, or one without links; whatever else is wrong shows when it is copied
        return False
    return True


def _reflink(source: Path, target: Path) -> bool:
    """Clone the file's blocks (Btrfs, XFS ...); False where that cannot be done."""
    with source.open("rb") as reader, target.open("wb") as writer:
        try:
            fcntl.ioctl(writer.fileno(), _FICLONE, reader.fileno())
        except OSError:
            return False
    return True


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders, in one step where the system can (Linux's renameat2), else in two renames."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None and not renameat2(
        _AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE
    ):
        return
    aside = new.with_name(new.name + "-replaced")
    old.rename(aside)
    new.rename(old)
    aside.rename(new)
