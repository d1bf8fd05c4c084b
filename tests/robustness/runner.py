"""Runs ``pmod`` on bad input in forked children, and holds each run to what every failure owes the user.

A run ends by itself within a time and an amount of memory. It exits with 0, 1 or 2. Where it fails, the last line on
stderr, and no other, is the error; no traceback is shown, and none is kept in a file, since that says that no one
foresaw the input. Nothing in the folder has changed but what the case may write.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pmod_cli.cli import main

SECONDS = 20
"""Of processor time; a run that waits is ended after three times as long."""
GIGABYTES = 1.0
"""Beyond what the process has at its start."""
_LARGE = 100_000


@dataclass(frozen=True)
class Case:
    """One command on one bad input.

    Attributes:
        name: Tells it from the others.
        words: What ``pmod`` gets; the working folder is a copy of the good one.
        spoil: Makes the input bad, in that folder.
        codes: Exit codes that are right.
        says: Must stand in the error's line.
        output: Names at the top of the folder that the command may write.
        prepare: Changes the child before the command starts: streams, limits.
    """

    name: str
    words: Sequence[str]
    spoil: Callable[[], object] = lambda: None
    codes: tuple[int, ...] = (2,)
    says: str = ""
    output: tuple[str, ...] = ()
    prepare: Callable[[], object] = lambda: None
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """Its subcommand."""
        return self.words[0]

    @property
    def patience(self) -> int:
        """How many times longer than others it may take: the demo runs many commands."""
        return 4 if self.command == "demo" else 1


def failures(case: Case, good: Path) -> list[str]:
    """Run a case on a copy of the good folder; what was wrong with the run, in words."""
    with tempfile.TemporaryDirectory(prefix="pmod-fuzz-") as base:
        work, scratch, told = Path(base, "work"), Path(base, "tmp"), Path(base, "stderr")
        _copy(good, work)
        scratch.mkdir()
        child = os.fork()
        if child == 0:
            _child(case, work, scratch, told)
        code, used, peak = _wait(child, SECONDS * case.patience)
        text = told.read_text(errors="replace") if told.exists() else ""
        kept = [path.read_text(errors="replace") for path in scratch.glob("pmod-error-*.txt")]
        wrong = [f"exit code {code}, not {case.codes}: {text[-500:]}"] if code not in case.codes else []
        if "Traceback (most recent" in text:
            wrong.append(f"a traceback is shown: {text[-800:]}")
        wrong += [f"unforeseen: {trace[-800:]}" for trace in kept]
        lines = text.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        if code == 2 and (len(errors) != 1 or lines[-1] not in errors):
            wrong.append(f"the error is not one line, the last: {text[-500:]}")
        if case.says and case.says not in "".join(errors):
            wrong.append(f"the error does not say {case.says!r}: {text[-300:]}")
        if any(ord(char) < 32 and char not in "\n\t" for char in text):
            wrong.append(f"a control code reaches the terminal: {text[-300:]!r}")
        if used > SECONDS * case.patience:
            wrong.append(f"it took {used:.0f} s")
        if code == -signal.SIGKILL:
            wrong.append("it waited for ever")
        if peak > GIGABYTES:
            wrong.append(f"it took {peak:.1f} GB")
        if not Path(base, "before").exists():
            return [f"the case itself fails: {text[-500:]}"]
        before, after = Path(base, "before").read_text().splitlines(), _listing(work, case.output)
        wrong += [f"changed: {line}" for line in sorted(set(before) ^ set(after))]
    return wrong


def _child(case: Case, work: Path, scratch: Path, told: Path) -> None:
    code = 70
    try:
        os.chdir(work)
        case.spoil()
        (work.parent / "before").write_text("\n".join(_listing(work, case.output)))
        tempfile.tempdir = None
        os.environ |= {"TMPDIR": str(scratch), **case.environment}
        for number, target in ((0, os.devnull), (1, work.parent / "stdout"), (2, told)):
            os.dup2(os.open(target, os.O_RDWR | os.O_CREAT), number)
        _bound(2 * SECONDS * case.patience)
        case.prepare()
        try:
            main([str(word) for word in case.words])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
    except BaseException:
        with told.open("a") as file:
            traceback.print_exc(file=file)
    finally:
        os._exit(code)


def _bound(seconds: int) -> None:
    """The machine's own memory and time are not at stake."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + int(3 * GIGABYTES * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))


def _wait(child: int, seconds: int) -> tuple[int, float, float]:
    """Exit code, seconds of processor time, and peak gigabytes beyond this process's own."""
    started = time.monotonic()
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() - started > 3 * seconds:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, (usage.ru_maxrss - own) / 2**20


def _copy(good: Path, work: Path) -> None:
    """Copy a folder, large files by links: a command that wrote into one would change the listing."""
    for folder, _, files in os.walk(good):
        here = work / Path(folder).relative_to(good)
        here.mkdir()
        for name in files:
            if Path(folder, name).stat().st_size > _LARGE:
                os.link(Path(folder, name), here / name)
            else:
                shutil.copy2(Path(folder, name), here / name)


def _listing(work: Path, output: Sequence[str]) -> list[str]:
    """Every file but the outputs, with its kind, size and time of change."""
    lines = []
    for path in sorted(work.rglob("*")):
        if path.relative_to(work).parts[0] in output:
            continue
        with suppress(OSError):
            status = path.lstat()
            size = status.st_size if path.is_file() else 0
            changed = status.st_mtime_ns if path.is_file() else 0
            lines.append(f"{os.fsencode(path.relative_to(work))!r} {status.st_mode:o} {size} {changed}")
    return lines
