"""The whole of ``pmod eval``: evaluate, print, hold against limits; or prepare, or compare two evaluations."""

from __future__ import annotations

import contextlib
import math
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement

from pmod_cli.devices import is_main_process
from pmod_cli.evaluation import paper
from pmod_cli.evaluation.diff import differences
from pmod_cli.evaluation.evaluate import evaluate, prepare
from pmod_cli.evaluation.options import EvalOptions
from pmod_cli.evaluation.requirements import PreflightError
from pmod_cli.evaluation.results import EvalResult
from pmod_cli.evaluation.tables import changes_table, notes, tables
from pmod_cli.output.console import OS_HINTS, emit_json, keep_traceback, show_lines, stderr, stdout
from pmod_cli.output.errors import GateError, PmodError
from pmod_cli.output.files import is_open, write_file
from pmod_cli.output.options import refuse_ignored
from pmod_cli.output.progress import late_progress
from pmod_cli.output.tables import Table
from pmod_cli.output.text import plain
from pmod_cli.recipe import nearest

FULL_MARKS = {"mme": 2000.0}
"""Best possible score of the tasks for which it is not 100; a drop is counted in percent of it."""


def run(options: EvalOptions) -> None:
    """Do what the options ask for, and print what came of it; a `GateError` if a limit was not met."""
    if options.diff:
        refuse_ignored(options, "--diff", ("diff", "include_path", "as_json", "offline"))
        _show_differences(*options.diff, options.include_path, options.as_json)
        return
    with _problems_shown(options.output):
        names = [name.strip() for name in options.tasks.split(",") if name.strip()]
        if not names:
            raise PmodError("--tasks is missing", "e.g. --tasks gqa,pope_full, or --tasks paper")
        if options.prepare:
            _prepare(options, names)
            return
        if options.model is None:
            raise PmodError("no MODEL to evaluate", "give a checkpoint folder or hub id")
        minimum = _parse_minimum(options.minimum or (), paper.expand(names))
        if options.max_drop is not None:
            if options.baseline is None:
                raise PmodError("--max-drop compares with a baseline", "give one with --baseline")
            if math.isnan(options.max_drop):
                raise PmodError("--max-drop nan is no number of points", "e.g. --max-drop 1.0")
        with late_progress() as show:
            result = evaluate(
                options.model,
                names,
                baseline=options.baseline,
                include_path=options.include_path,
                output=options.output,
                force=options.force,
                offline=options.offline,
                settings=options.settings(),
                progress=show if is_main_process() else None,
            )
        missed = list(_missed(result, minimum, options.max_drop))
        if is_main_process():
            _show(result, missed, options.as_json)
        number = result.failed_samples
        if number:
            its = "sample failed, so its task has" if number == 1 else "samples failed, so their tasks have"
            raise GateError(f"{number} {its} no score", result.first_failure)
        if result.without_score:
            why = result.first_broken_metric or "the task's metric_list and process_results gave no number"
            raise GateError(f"no score for {', '.join(result.without_score)}", why)
        if missed:
            raise GateError("; ".join(missed))


def _parse_minimum(values: Iterable[str], tasks: list[str]) -> dict[str, float]:
    """Read ``task=score`` pairs; each has to be of one of the tasks."""
    minimum = {}
    for value in values:
        task, _, number = value.partition("=")
        try:
            minimum[task] = float(number)
            if math.isnan(minimum[task]):  # nothing is below it, so the gate would always be met
                raise ValueError
        except ValueError:
            raise PmodError(f"--min {value}: expected task=score", "e.g. --min gqa=60") from None
        if task not in tasks:
            near = nearest(task, tasks)
            hint = f"did you mean {near}?" if near else None
            raise PmodError(f"--min {value}: {task!r} is not among the tasks", hint)
    return minimum


def _missed(result: EvalResult, minimum: dict[str, float], max_drop: float | None) -> Iterator[str]:
    """What was not met, one sentence each: the lowest allowed scores by task, the largest drop below the baseline."""
    for task in result.tasks:
        value, before = task.model.value, task.baseline.value if task.baseline else None
        if task.name in minimum and (value is None or value < minimum[task.name]):
            reached = "has no score" if value is None else f"reached {value:.2f}"
            yield f"{task.name} {reached}, asked for {minimum[task.name]:g}"
        if max_drop is None:
            continue
        if value is None or before is None:
            yield f"{task.name} cannot be compared: a score is missing"
            continue
        drop = (before - value) * 100 / FULL_MARKS.get(task.name, 100.0)
        if drop > max_drop:
            yield f"{task.name} dropped by {drop:.2f} ({before:.2f} to {value:.2f}), allowed {max_drop:g}"


def _show(result: EvalResult, missed: list[str], as_json: bool) -> None:
    if as_json:
        emit_json("eval", result.to_dict() | {"missed": missed})
        return
    for table in tables(result, errors=not result.baseline):
        _print_whole(table)
    for note in notes(result):
        stdout.print(plain(note), style="dim", soft_wrap=True, markup=False)


def _print_whole(table: Table) -> None:
    """Print a table at its full width, however narrow the terminal or log is."""
    whole = table.to_rich()
    whole.box, whole.pad_edge = SIMPLE_HEAD, False  # the paper's tables have ten columns
    wanted = Measurement.get(stdout, stdout.options.update(max_width=1000), whole).maximum
    Console(file=stdout.file, width=wanted, highlight=False).print(whole)


def _prepare(options: EvalOptions, names: list[str]) -> None:
    checkpoints = [source for source in (options.model, options.baseline) if source]
    ready = prepare(names, options.include_path, checkpoints)
    if options.as_json:
        emit_json("eval", {"prepared": ready})
    else:
        show_lines(*(f"{task}: {rows} documents" for task, rows in ready.items()))


def _show_differences(first: Path, second: Path, include_path: list[Path] | None, as_json: bool) -> None:
    found = differences(first, second, include_path)
    if as_json:
        emit_json("eval", found)
        return
    _print_whole(changes_table(found["changed"]))
    show_lines(f"{found['compared']} samples compared: {found['better']} better, {found['worse']} worse")
    if found["left_out"]:
        why = "they failed, do not count for the score, had another prompt, or are in one evaluation alone"
        show_lines(f"{found['left_out']} left out: {why}")


@contextlib.contextmanager
def _problems_shown(output: Path | None) -> Iterator[None]:
    """Show all that is missing as a table; print unexpected errors of the tasks' code as one line.

    The traceback goes into the output folder, or into a temporary file where this process has none open.
    """
    try:
        yield
    except PreflightError as error:
        if is_main_process():
            stderr.print(Table("Missing", ("for", "what is missing", "remedy"), error.problems, 3).to_rich())
        raise
    except (PmodError, BrokenPipeError):
        raise
    except (Exception, SystemExit) as error:  # tasks' code may end the program
        if isinstance(error, OSError) and error.errno in OS_HINTS:
            raise
        if output is not None and is_open(output):
            log = output / "error.log"
            write_file(log, traceback.format_exc().encode(errors="backslashreplace"))
            where = f"the traceback is in {log}"
        else:
            where = keep_traceback(error)
        if output is None or is_open(output):  # else it had not begun
            where += "; answers so far are kept, the same command goes on"
        traceback.clear_frames(error.__traceback__)  # which ends progress bars before the error's line
        what = " ".join(str(error).split())[:200]
        raise PmodError(f"the evaluation broke off: {type(error).__name__}: {what}", where) from error
