"""``pmod eval``: benchmarks through lmms-eval's own evaluator."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from pmod_cli.cli.app import app
from pmod_cli.cli.output import emit_json, stderr, stdout
from pmod_cli.errors import GateError, PmodError


@app.command("eval")
def evaluate_command(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id, dense or p-MoD.")],
    tasks: Annotated[str, typer.Option("--tasks", help="lmms-eval task names, separated by commas.")],
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="A checkpoint to compare with, evaluated the same way.")
    ] = None,
    include_path: Annotated[
        list[Path] | None, typer.Option("--include-path", help="Folder with more task YAML; may be repeated.")
    ] = None,
    batch_size: Annotated[str, typer.Option("--batch-size", help="Samples a batch, or auto.")] = "auto",
    limit: Annotated[
        float | None,
        typer.Option("--limit", help="First N documents of each task; below 1, that share of them."),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, help="Upper limit on the tasks' own.")
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16; auto is float32 on a CPU.")
    ] = "auto",
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, ...")] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Folder for answers and results; a rerun goes on from there."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Evaluate a model on lmms-eval's benchmarks.

    Examples:
      pmod eval ./pmod-llava-1.5-7b --tasks gqa,pope_full --output results

      pmod eval ./pmod-llava-1.5-7b --tasks gqa --baseline llava-hf/llava-1.5-7b-hf --limit 100
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # one progress bar is enough
    from pmod_cli.evaluation import report
    from pmod_cli.evaluation.batching import parse_batch_size
    from pmod_cli.evaluation.run import EvalSettings, evaluate

    try:
        size = parse_batch_size(batch_size)
    except ValueError:
        raise PmodError(f"--batch-size {batch_size}: give a positive number or auto") from None
    settings = EvalSettings(
        batch_size=size, limit=limit, max_new_tokens=max_new_tokens, dtype=dtype, device=device
    )
    with _Progress() as progress:
        result = evaluate(
            model,
            [name.strip() for name in tasks.split(",") if name.strip()],
            baseline=baseline,
            include_path=include_path,
            output=output,
            settings=settings,
            progress=progress,
        )
    if as_json:
        emit_json("eval", result.to_dict())
    else:
        stdout.print(report.table(result))
    if result.failed_samples:
        raise GateError(
            f"{result.failed_samples} samples failed, so their tasks have no score", result.first_failure
        )


class _Progress:
    """A bar a task and model on stderr."""

    def __enter__(self) -> _Progress:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=stderr,
        )
        self._ids: dict[tuple[str, str], object] = {}
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(self, role: str, task: str, done: int, total: int) -> None:
        if (role, task) not in self._ids:
            self._ids[role, task] = self._bars.add_task(f"{role}: {task}", total=total)
        self._bars.update(self._ids[role, task], completed=done)  # type: ignore[arg-type]
