"""The whole of ``pmod eval``: evaluate, print, hold against limits; or prepare, or compare two evaluations."""

from __future__ import annotations

import contextlib
import math
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from pmod_cli.devices import is_main_process
from pmod_cli.evaluation import gates, paper
from pmod_cli.evaluation.diff import differences
from pmod_cli.evaluation.evaluate import evaluate, prepare
from pmod_cli.evaluation.options import EvalOptions
from pmod_cli.evaluation.requirements import PreflightError
from pmod_cli.evaluation.results import EvalResult
from pmod_cli.evaluation.tables import changes_table, notes, tables
from pmod_cli.output.console import OS_HINTS, emit_json, stderr, stdout
from pmod_cli.output.errors import GateError, PmodError
from pmod_cli.output.tables import Table


def run(options: EvalOptions) -> None:
    """Do what the options ask for, and print what came of it.

    Raises:
        GateError: A sample failed, or a limit was not met.
        PmodError: Options that do not go together, or something that is missing or cannot be used.
    """
    names = [name.strip() for name in options.tasks.split(",") if name.strip()]
    if options.diff:
        return _show_differences(*options.diff, options.as_json)
    if not names:
        raise PmodError("--tasks is missing", "e.g. --tasks gqa,pope_full, or --tasks paper")
    if options.prepare:
        return _prepare(options, names)
    if options.model is None:
        raise PmodError("no MODEL to evaluate", "give a checkpoint folder or hub id")
    limits = gates.parse_minimum(options.minimum or (), paper.expand(names))
    _check_drop(options)
    with _problems_shown(options.output), _Progress(is_main_process()) as progress:
        result = evaluate(
            options.model,
            names,
            baseline=options.baseline,
            include_path=options.include_path,
            output=options.output,
            force=options.force,
            offline=options.offline,
            settings=options.settings(),
            progress=progress,
        )
    missed = gates.check(result, limits, options.max_drop)
    if is_main_process():
        _show(result, missed, options.as_json)
    _raise_if_incomplete(result)
    if missed:
        raise GateError("; ".join(missed))


def _check_drop(options: EvalOptions) -> None:
    if options.max_drop is None:
        return
    if options.baseline is None:
        raise PmodError("--max-drop compares with a baseline", "give one with --baseline")
    if math.isnan(options.max_drop):
        raise PmodError("--max-drop nan is no number of points", "e.g. --max-drop 1.0")


def _raise_if_incomplete(result: EvalResult) -> None:
    """An evaluation in which something failed ends with exit code 1."""
    number = result.failed_samples
    if number:
        what = (
            "1 sample failed, so its task has"
            if number == 1
            else f"{number} samples failed, so their tasks have"
        )
        raise GateError(f"{what} no score", result.first_failure)
    if result.without_score:
        raise GateError(f"no score for {', '.join(result.without_score)}", result.first_broken_metric)


def _show(result: EvalResult, missed: list[str], as_json: bool) -> None:
    if as_json:
        emit_json("eval", result.to_dict() | {"missed": missed})
        return
    for table in tables(result, errors=not result.baseline):
        _print_whole(table)
    for note in notes(result):
        stdout.print(note, style="dim", soft_wrap=True, markup=False)


def _print_whole(table: Table) -> None:
    """Print a table at its full width, however narrow the terminal or log is."""
    whole = table.to_rich()
    whole.box, whole.pad_edge = SIMPLE_HEAD, False  # the paper's tables have ten columns
    wanted = Measurement.get(stdout, stdout.options.update(max_width=1000), whole).maximum
    Console(file=stdout.file, width=wanted, highlight=False).print(whole)


def _prepare(options: EvalOptions, names: list[str]) -> None:
    checkpoints = [source for source in (options.model, options.baseline) if source]
    with _problems_shown(None):
        ready = prepare(names, options.include_path or (), checkpoints)
    if options.as_json:
        emit_json("eval", {"prepared": ready})
        return
    for task, rows in ready.items():
        stdout.print(f"{task}: {rows} documents", markup=False)


def _show_differences(first: Path, second: Path, as_json: bool) -> None:
    with _problems_shown(None):
        found = differences(first, second)
    if as_json:
        emit_json("eval", found)
        return
    _print_whole(changes_table(found["changed"]))
    stdout.print(f"{found['compared']} samples compared: {found['better']} better, {found['worse']} worse")
    if found["left_out"]:
        why = "they failed, do not count for the score, had another prompt, or are in one evaluation alone"
        stdout.print(f"{found['left_out']} left out: {why}", soft_wrap=True)


@contextlib.contextmanager
def _problems_shown(output: Path | None) -> Iterator[None]:
    """Show all that is missing as a table; print unexpected errors of the tasks' code as one line.

    Args:
        output: Where the traceback of an unexpected error goes, if there is such a folder.
    """
    try:
        yield
    except PreflightError as error:
        if is_main_process():
            rows = [(problem.task, problem.what, problem.remedy) for problem in error.problems]
            stderr.print(Table("Missing", ("for", "what is missing", "remedy"), rows, left=3).to_rich())
        raise
    except (PmodError, BrokenPipeError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in OS_HINTS:
            raise
        folder = output if output is not None and output.is_dir() else Path(tempfile.mkdtemp(prefix="pmod-"))
        log = folder / "error.log"
        log.write_text(traceback.format_exc(), encoding="utf-8")
        what = " ".join(str(error).split())[:200]
        raise PmodError(
            f"the evaluation broke off: {type(error).__name__}: {what}",
            f"the traceback is in {log}; answers so far are kept, the same command goes on",
        ) from error


class _Progress:
    """One bar per task and model on stderr."""

    def __init__(self, visible: bool) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self._bars = Bars(*columns, console=stderr, disable=not visible)
        self._ids: dict[tuple[str, str], TaskID] = {}

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(self, role: str, task: str, done: int, total: int) -> None:
        self._bars.start()  # not before: an error found in time leaves no empty bars
        if (role, task) not in self._ids:
            self._ids[role, task] = self._bars.add_task(f"{role}: {task}", total=total)
        self._bars.update(self._ids[role, task], completed=done)
