"""``pmod eval``: benchmarks through lmms-eval's own evaluator."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pmod_cli.cli.app import app, examples
from pmod_cli.extras import starting
from pmod_cli.output.console import OS_HINTS, emit_json, stderr, stdout
from pmod_cli.output.errors import GateError, PmodError

if TYPE_CHECKING:
    from rich.table import Table

    from pmod_cli.evaluation.requirements import PreflightError


@app.command(
    "eval",
    epilog=examples(
        "pmod eval ./pmod-llava-1.5-7b --tasks paper --baseline llava-hf/llava-1.5-7b-hf --output results",
        "pmod eval ./pmod-llava-1.5-7b --tasks gqa,pope_full --limit 100 --min gqa=60",
        "pmod eval --prepare --tasks paper",
        "pmod eval --diff results-before results-after",
    ),
)
def evaluate_command(
    model: Annotated[
        str | None, typer.Argument(help="Checkpoint folder or hub id, dense or p-MoD.", show_default=False)
    ] = None,
    tasks: Annotated[
        str,
        typer.Option("--tasks", help="lmms-eval task names, separated by commas; paper for the paper's 14."),
    ] = "",
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="A checkpoint to compare with, evaluated the same way.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Folder for answers and results; a rerun goes on from there."),
    ] = None,
    batch_size: Annotated[str, typer.Option("--batch-size", help="Samples a batch, or auto.")] = "auto",
    limit: Annotated[
        float | None,
        typer.Option("--limit", help="First N documents of each task; below 1, that share of them."),
    ] = None,
    include_path: Annotated[
        list[Path] | None, typer.Option("--include-path", help="Folder with more task YAML; may be repeated.")
    ] = None,
    minimum: Annotated[
        list[str] | None, typer.Option("--min", help="task=score: exit 1 below it; may be repeated.")
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option("--max-drop", help="Exit 1 if a task drops by more points below the baseline."),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, help="Upper limit on the tasks' own.")
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16; auto is float32 on a CPU.")
    ] = "auto",
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, ...")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Never ask the network.")] = False,
    prepare: Annotated[
        bool, typer.Option("--prepare", help="Only download what the tasks (and MODEL) need.")
    ] = False,
    diff: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            "--diff", help="Two output folders: list the samples whose score changed.", show_default=False
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Start over: forget kept answers, replace other models' results in --output."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Evaluate a model on lmms-eval's benchmarks, beside its baseline.

    Exit code 1 if a sample failed or a limit was not met.
    """
    if offline:
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # before anything is imported
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if diff:
        return _show_diff(*diff, as_json)
    if not names:
        raise PmodError("--tasks is missing", "e.g. --tasks gqa,pope_full, or --tasks paper")
    if prepare:
        checkpoints = [source for source in (model, baseline) if source]
        return _prepare(names, include_path or [], checkpoints, as_json)
    if model is None:
        raise PmodError("no MODEL to evaluate", "give a checkpoint folder or hub id")
    os.environ.setdefault("TQDM_DISABLE", "1")  # one progress bar is enough
    _evaluate(
        model,
        names,
        baseline=baseline,
        output=output,
        include_path=include_path or [],
        minimum=minimum or [],
        max_drop=max_drop,
        offline=offline,
        force=force,
        as_json=as_json,
        options={
            "batch_size": batch_size,
            "limit": limit,
            "max_new_tokens": max_new_tokens,
            "dtype": dtype,
            "device": device,
        },
    )


def _evaluate(
    model: str,
    names: list[str],
    *,
    baseline: str | None,
    output: Path | None,
    include_path: list[Path],
    minimum: list[str],
    max_drop: float | None,
    offline: bool,
    force: bool,
    as_json: bool,
    options: dict[str, object],
) -> None:
    with starting("eval"):
        from pmod_cli.devices import rank
        from pmod_cli.evaluation import gates, paper
        from pmod_cli.evaluation import tables as report
        from pmod_cli.evaluation.evaluate import evaluate
        from pmod_cli.evaluation.options import EvalSettings
        from pmod_cli.evaluation.requirements import PreflightError

    limits = gates.parse_minimum(minimum, paper.expand(names))
    if max_drop is not None and baseline is None:
        raise PmodError("--max-drop compares with a baseline", "give one with --baseline")
    if max_drop is not None and math.isnan(max_drop):
        raise PmodError("--max-drop nan is no number of points", "e.g. --max-drop 1.0")
    settings = EvalSettings(**options)  # type: ignore[arg-type]
    try:
        with _errors_as_one_line(output), _Progress(rank() == 0) as progress:
            result = evaluate(
                model,
                names,
                baseline=baseline,
                include_path=include_path,
                output=output,
                force=force,
                offline=offline,
                settings=settings,
                progress=progress,
            )
    except PreflightError as error:
        if rank() == 0:
            _show_problems(error)
        raise
    missed = gates.check(result, limits, max_drop)
    if rank() == 0:
        if as_json:
            emit_json("eval", result.to_dict() | {"missed": missed})
        else:
            for table in report.tables(result):
                _print_whole(table)
            for note in report.notes(result):
                stdout.print(note, style="dim", soft_wrap=True)
    if result.failed_samples:
        number = result.failed_samples
        what = (
            "1 sample failed, so its task has"
            if number == 1
            else f"{number} samples failed, so their tasks have"
        )
        raise GateError(f"{what} no score", result.first_failure)
    if result.without_score:
        raise GateError(f"no score for {', '.join(result.without_score)}", result.first_broken_metric)
    if missed:
        raise GateError("; ".join(missed))


@contextlib.contextmanager
def _errors_as_one_line(output: Path | None) -> Iterator[None]:
    """Tasks are other people's code: what it raises unforeseen is one line here, and whole in a file."""
    try:
        yield
    except (PmodError, BrokenPipeError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in OS_HINTS:
            raise
        import tempfile
        import traceback

        folder = output if output is not None and output.is_dir() else Path(tempfile.mkdtemp(prefix="pmod-"))
        log = folder / "error.log"
        log.write_text(traceback.format_exc(), encoding="utf-8")
        what = " ".join(str(error).split())[:200]
        raise PmodError(
            f"the evaluation broke off: {type(error).__name__}: {what}",
            f"where is in {log}; what was answered is kept, the same command goes on",
        ) from error


def _print_whole(table: Table) -> None:
    """Print a table at its full width, however narrow the terminal or log is."""
    from rich.console import Console
    from rich.measure import Measurement

    wanted = Measurement.get(stdout, stdout.options.update(max_width=1000), table).maximum
    Console(file=stdout.file, width=wanted, highlight=False).print(table)


def _prepare(names: list[str], include_path: list[Path], checkpoints: list[str], as_json: bool) -> None:
    with starting("eval"):
        from pmod_cli.evaluation.evaluate import prepare
        from pmod_cli.evaluation.requirements import PreflightError

    try:
        with _errors_as_one_line(None):
            ready = prepare(names, include_path, checkpoints)
    except PreflightError as error:
        _show_problems(error)
        raise
    if as_json:
        emit_json("eval", {"prepared": ready})
    else:
        for task, rows in ready.items():
            stdout.print(f"{task}: {rows} documents")


def _show_diff(first: Path, second: Path, as_json: bool) -> None:
    from pmod_cli.evaluation import tables as report
    from pmod_cli.evaluation.diff import differences

    with _errors_as_one_line(None):
        found = differences(first, second)
    if as_json:
        emit_json("eval", found)
        return
    _print_whole(report.diff_table(found["changed"]))
    stdout.print(f"{found['compared']} samples compared: {found['better']} better, {found['worse']} worse")
    if found["left_out"]:
        why = "they failed, do not count for the score, were asked otherwise, or are in one evaluation alone"
        stdout.print(f"{found['left_out']} left out: {why}", soft_wrap=True)


def _show_problems(error: PreflightError) -> None:
    from rich.table import Table

    table = Table("for", "what is missing", "remedy", title="Missing", title_justify="left")
    for problem in error.problems:
        table.add_row(problem.task, problem.what, problem.remedy)
    stderr.print(table)


class _Progress:
    """A bar a task and model on stderr."""

    def __init__(self, visible: bool) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TaskID,
            TextColumn,
            TimeRemainingColumn,
        )

        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=stderr,
            disable=not visible,
        )
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
