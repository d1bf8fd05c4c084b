"""Paths as users name them."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path


def user_path(name: str | Path) -> Path:
    """A path as the user named it, with their home folder for ``~``; ``~nosuchuser`` stays, without an error."""
    return Path(os.path.expanduser(name))  # noqa: PTH111  # Path.expanduser raises


def real_path(name: str | Path) -> Path:
    """A `user_path` without links; pathlib's own method raises errors of several kinds for link loops."""
    return Path(os.path.realpath(user_path(name)))


def public_name(name: str | Path) -> str:
    """How a checkpoint is called in what may be shared: a hub id, or a folder's name without the way to it."""
    path = user_path(name)
    return real_path(path).name if path.exists() or path.is_absolute() else str(name)


def existing_parent(path: Path) -> Path:
    """The nearest thing above a path that is there: a folder, where the path can be made."""
    return next(parent for parent in path.absolute().parents if os.path.lexists(parent))


def is_file_name(name: object) -> bool:
    """Whether what a stranger's file says is the name of a file in one folder."""
    return isinstance(name, str) and name.isprintable() and Path(name).name == name not in ("", "..")


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path stays in a folder, links followed: a stranger's folder may hold links to what is not theirs."""
    return real_path(path).is_relative_to(real_path(folder))


def cache_folder() -> Path:
    """Where pmod keeps what it would otherwise make again: ``PMOD_CACHE``, or ``pmod`` in the user's cache.

    A user without a home has a folder that goes with the process.
    """
    if given := os.environ.get("PMOD_CACHE"):
        return user_path(given)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or user_path("~/.cache"))
    return cache / "pmod" if cache.parts[:1] != ("~",) else Path(_temporary().name)


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="pmod-", ignore_cleanup_errors=True)
