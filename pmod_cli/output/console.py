"""What every command shares: results to stdout, everything else to stderr, errors as one line."""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import os
import sys
import tempfile
import traceback
from typing import Any

from rich.console import Console

from pmod_cli.output import signals
from pmod_cli.output.errors import PmodError, is_out_of_memory, variables_in
from pmod_cli.output.files import tag
from pmod_cli.output.text import plain


class _Plain(logging.LogRecord):
    def getMessage(self) -> str:
        """What any library logs may quote a stranger's file."""
        return plain(super().getMessage())


class _PipeConsole(Console):
    def on_broken_pipe(self) -> None:
        """Let `report_error` decide, as for every other write; rich would exit with code 1."""
        raise BrokenPipeError


def _console(error: bool) -> Console:
    stream = sys.stderr if error else sys.stdout
    # In a pipe or a CI log there is no terminal to fit a table into.
    width = None if (stream and stream.isatty()) or "COLUMNS" in os.environ else 120
    return _PipeConsole(stderr=error, highlight=False, width=width)


stdout, stderr = _console(error=False), _console(error=True)


def prepare_streams() -> None:
    """Make stdout and stderr take every text, and report every failure.

    stdout is buffered in spite of PYTHONUNBUFFERED, under which Python loses what a full disk does not take. What an
    encoding lacks is spelled out. A closed stream's number would go to the next file that is opened.

    Raises:
        PmodError: stdout is closed.
    """
    logging.setLogRecordFactory(_Plain)
    closed = sys.stdout is None
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    # None of these is closed before the process ends, hence the noqa.
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    if closed:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        raise PmodError(
            "stdout is closed, so there is no place for the result", "> /dev/null if it is not wanted"
        )
    stream = sys.__stdout__
    if stream is not None and sys.stdout is stream and isinstance(stream.buffer, io.RawIOBase):
        sys.stdout = open(stream.fileno(), "w", buffering=1, encoding=stream.encoding, closefd=False)  # noqa: SIM115
    for each in (sys.stdout, sys.stderr):
        if isinstance(each, io.TextIOWrapper):
            each.reconfigure(errors="backslashreplace")


def show_lines(*lines: str) -> None:
    """Print lines on stdout as they are: nothing in them is markup or a control code, and none is wrapped."""
    for line in lines:
        stdout.print(plain(line), markup=False, soft_wrap=True)


def tell(*lines: str) -> None:
    """The same on stderr."""
    for line in lines:
        stderr.print(plain(line), markup=False, soft_wrap=True)


def emit_json(command: str, result: Any) -> None:
    """Print the one JSON object that ``--json`` promises (see ``docs/json.md``), null for what is not finite."""
    document = tag(command) | {"result": result}
    try:
        try:
            text = json.dumps(document, indent=2, allow_nan=False)
        except ValueError:  # what was read or measured is not finite, for which JSON has no number
            text = json.dumps(_finite(document), indent=2, allow_nan=False)
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        raise BrokenPipeError from None  # without its number, on which typer would exit with code 1


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def report_error(error: BaseException, debug: bool = False) -> int:
    """Print an error on stderr as one line, after its traceback if ``debug``; returns the exit code.

    The traceback of an error that no one foresaw is kept in a file, which the line names.
    """
    if debug:
        traceback.print_exception(error)
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
        _flush_stdout()
        where = f" ({error.filename})" if error.filename else ""
        _line(f"{os.strerror(error.errno)}{where}: {OS_HINTS[error.errno]}")
        return 2
    if is_out_of_memory(error):
        _line("out of memory (end other programs, or ask for less)")
        return 2
    if any(sign in str(error) for sign in _NO_PROCESS):
        _line("no further thread or process can be started (raise the limit of processes, ulimit -u)")
        return 2
    _flush_stdout()
    what = f"{type(error).__name__}: {plain(str(error))[:_LONGEST]}" if str(error) else type(error).__name__
    # Libraries read variables when they are imported, typer among them.
    hint = variables_in(what) or f"unforeseen; {'see above' if debug else keep_traceback(error)}"
    _line(f"{what} ({hint})")
    return 2


def keep_traceback(error: BaseException) -> str:
    """Write an error's traceback to a temporary file; returns a hint that says where it is."""
    try:
        number, path = tempfile.mkstemp(prefix="pmod-error-", suffix=".txt")
        with os.fdopen(number, "w", encoding="utf-8", errors="backslashreplace") as file:
            traceback.print_exception(error, file=file)
    except OSError:
        return "--debug shows the traceback"
    return f"the traceback is in {path}, --debug shows it"


def _flush_stdout() -> None:
    try:
        sys.stdout.flush()
    except OSError:  # stdout itself is full: what it still holds would end in exit code 120
        _discard_stdout()


def _discard_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


_NO_PROCESS = ("can't start new thread", os.strerror(errno.EAGAIN))
"""What errors say, of whatever kind Python, Arrow and Rust make of it."""

_LONGEST = 300
"""Characters of an unforeseen error's message that are shown."""


OS_HINTS = {
    errno.ENOSPC: "free some space or choose another output folder",
    errno.EDQUOT: "free some space or choose another output folder",
    errno.EFBIG: "the shell's limit (ulimit -f) or the file system's is reached; choose another output folder",
    errno.EACCES: "choose a place you may read and write",
    errno.EPERM: "choose a place you may read and write",
    errno.EROFS: "choose a writable place",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EEXIST: "something is there, maybe a link that leads nowhere; choose another place",
    errno.EISDIR: "give a file, not a folder",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "a link leads to itself; check the path",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs: the system has too many open files",
    errno.ENXIO: "give a regular file",
    errno.ENODEV: "give a regular file",
    errno.EIO: "the disk or network drive fails; choose another place",
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
    try:
        sys.stderr.write(f"error: {plain(' '.join(message.split()))}\n")
        sys.stderr.flush()
    except OSError:  # no one can be told; the exit code still says it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
