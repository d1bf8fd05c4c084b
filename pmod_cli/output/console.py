"""What every command shares: results to stdout, everything else to stderr, errors as one line."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from typing import Any

from rich.console import Console

from pmod_cli.output import signals
from pmod_cli.output.errors import PmodError
from pmod_cli.output.files import tag


class _PipeConsole(Console):
    def on_broken_pipe(self) -> None:
        """Let `report_error` decide, as for every other write; rich would exit with code 1."""
        raise BrokenPipeError


def _console(error: bool) -> Console:
    stream = sys.stderr if error else sys.stdout
    # In a pipe or a CI log there is no terminal to fit a table into.
    width = None if stream.isatty() or "COLUMNS" in os.environ else 120
    return _PipeConsole(stderr=error, highlight=False, width=width)


stdout, stderr = _console(error=False), _console(error=True)


def buffer_stdout() -> None:
    """Buffer stdout in spite of PYTHONUNBUFFERED, under which Python loses what a full disk does not take."""
    stream = sys.__stdout__
    if stream is None or sys.stdout is not stream or not isinstance(stream.buffer, io.RawIOBase):
        return
    sys.stdout = open(  # noqa: SIM115
        stream.fileno(), "w", buffering=1, encoding=stream.encoding, errors=stream.errors, closefd=False
    )


def show_lines(*lines: str) -> None:
    """Print lines on stdout as they are: nothing in them is markup, and none is wrapped."""
    for line in lines:
        stdout.print(line, markup=False, soft_wrap=True)


def emit_json(command: str, result: Any) -> None:
    """Print the one JSON object that ``--json`` promises (see ``docs/json.md``)."""
    document = tag(command) | {"result": result}
    try:
        sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        raise BrokenPipeError from None  # without its number, on which typer would exit with code 1


def report_error(error: BaseException) -> int | None:
    """Print a user-facing error on stderr as one line.

    Returns:
        The exit code, or None when the error is not one of the user's making and should be seen whole.
    """
    if (number := signals.arrived()) is not None:  # libraries turn it into errors of their own
        _line("interrupted; what was finished is kept")
        return 128 + number
    if isinstance(error, PmodError):
        _line(str(error))
        return error.exit_code
    if hasattr(error, "format_message"):  # typer's own, of the click that it brings or finds
        return _usage_error(error)
    if isinstance(error, KeyboardInterrupt):
        _line("interrupted; what was finished is kept")
        return 130
    if isinstance(error, BrokenPipeError):
        # The reader of our pipeline went away (`pmod ... | head`): not an error worth a line.
        _discard_stdout()
        return 0
    if isinstance(error, OSError) and error.errno in OS_HINTS:
        try:
            sys.stdout.flush()
        except OSError:  # stdout itself is full: what it still holds would end in exit code 120
            _discard_stdout()
        where = f" ({error.filename})" if error.filename else ""
        _line(f"{os.strerror(error.errno)}{where}: {OS_HINTS[error.errno]}")
        return 2
    return None


def _discard_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


OS_HINTS = {
    errno.ENOSPC: "free some space or choose another output folder",
    errno.EDQUOT: "free some space or choose another output folder",
    errno.EFBIG: "the shell's limit (ulimit -f) or the file system's is reached; choose another output folder",
    errno.EACCES: "choose a place you may read and write",
    errno.EPERM: "choose a place you may read and write",
    errno.EROFS: "choose a writable place",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "give a file, not a folder",
}


def _usage_error(error: Any) -> int:
    """A wrong command line, in one line; help where nothing was asked for."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
    else:
        command = f"; {error.ctx.command_path} --help" if getattr(error, "ctx", None) else ""
        _line(f"{error.format_message().rstrip('.').replace('Value error, ', '')}{command}")
    return error.exit_code


def _line(message: str) -> None:
    sys.stderr.write("error: " + " ".join(message.split()) + "\n")
    sys.stderr.flush()
