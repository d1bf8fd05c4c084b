"""The errors that a user can cause, each with the exit code it ends in."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager


class PmodError(Exception):
    """Bad input or environment: one clear line, exit code 2.

    Args:
        message: What is wrong, in one line.
        hint: What to do about it, in one line; shown after the message.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class GateError(PmodError):
    """A limit that the user set was not met: exit code 1."""

    exit_code = 1


class MissingExtraError(PmodError):
    """An optional dependency is not installed; ``extra`` brings it, or pmod-cli itself if that is None."""

    def __init__(self, package: str, extra: str | None) -> None:
        what = f"'pmod-cli[{extra}]'" if extra else "pmod-cli"
        super().__init__(f"{package} is not installed", f"pip install {what}")


class BrokenPackageError(PmodError):
    """A package is installed, and its import fails for a ``reason``; ``remedy`` mends it."""

    def __init__(self, package: str, reason: str, remedy: str) -> None:
        super().__init__(f"{package} is installed but cannot be imported: {reason}", remedy)
        self.reason = reason


@contextmanager
def told_as(message: str, hint: str | None = None) -> Iterator[None]:
    """Make a `PmodError` of whatever a library raises over a stranger's file, which is of any kind."""
    try:
        yield
    except (PmodError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic in a library of Rust's is no Exception
        raise PmodError(f"{message}: {first_line(error)}", hint) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that the device or the machine has no more memory; torch, which has its own, is not imported."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch's CPU allocator


def first_line(error: BaseException) -> str:
    """What an error says, in one line, with the next if it ends in a colon; the name of its kind if it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


def variables_in(why: str) -> str | None:
    """What mends an error, told as "Kind: words", if a variable of the environment, or its value, stands in it."""
    if not why.startswith(("ValueError", "FileExistsError", "NotADirectoryError", "FileNotFoundError")):
        return None
    found = [
        name
        for name, value in os.environ.items()
        if ("_" in name and re.search(rf"\b{re.escape(name)}\b", why)) or (value and repr(value) in why)
    ]
    return f"in the environment, correct or unset {' or '.join(found)}" if found else None
