"""Files read with one-line errors, and never a pipe, a device or what cannot be meant."""

from __future__ import annotations

import contextlib
import json
import math
import stat
from pathlib import Path
from typing import Any

from pmod_cli.output.errors import PmodError, first_line
from pmod_cli.output.paths import is_inside


def read_text(path: Path, largest: int = 64 * 2**20) -> str:
    """The text of a regular file of no more than so many bytes: a pipe would wait, a device never end.

    Raises:
        PmodError: Another kind of file, or a larger one.
        OSError, ValueError: It cannot be read, or is not UTF-8.
    """
    check_regular(path, largest)
    return path.read_text(encoding="utf-8")


def check_regular(path: Path, largest: int | None = None, name: object = None) -> None:
    """Refuse what is no regular file, or larger than so many bytes, before it is opened; errors as of `read_text`.

    They call the file ``name``, by default the path.
    """
    name = path if name is None else name
    try:
        status = path.stat()
    except RuntimeError as error:  # Python's before 3.13 for a link to itself
        raise PmodError(f"cannot read {name}: {first_line(error)}") from error
    if not stat.S_ISREG(status.st_mode):
        raise PmodError(f"{name} is not a regular file")
    if largest is not None and status.st_size > largest:
        raise PmodError(f"{name} is larger than {largest >> 20} MiB", "it cannot be meant")


def check_inside(path: Path, folder: Path) -> None:
    """Refuse what a link takes out of a folder, which may be a stranger's: it would be read, copied and shared."""
    # The hub's cache holds links into a folder beside its snapshots.
    blobs = next(
        (each.parent / "blobs" for each in folder.absolute().parents if each.name == "snapshots"), folder
    )
    if not is_inside(path, folder) and (blobs.is_symlink() or not is_inside(path, blobs)):
        raise PmodError(f"{path} is a link out of {folder}", "copy there what it leads to")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that should hold an object; `PmodError` if it cannot be read or holds something else."""
    try:
        data = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise PmodError(f"cannot read {path}: {first_line(error)}") from error
    if not isinstance(data, dict):
        raise PmodError(f"cannot read {path}: not a JSON object")
    return data


def read_json_lines(path: Path) -> list[Any]:
    """The values of a JSON Lines file that is written to as work goes on; none where there is no file.

    A line that a kill cut off is left out.

    Raises:
        PmodError: It is larger than 512 MiB.
    """
    rows: list[Any] = []
    if not path.is_file():
        return rows
    check_regular(path, 2**29)
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError, RecursionError):
                rows.append(json.loads(line))
    return rows


def is_number(value: object) -> bool:
    """Whether a value of JSON can be computed with: no NaN, and nothing that a float cannot hold."""
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:
        return False
