"""``pmod eval``: benchmarks through lmms-eval's own evaluator."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from pmod_cli.cli.app import app, examples
from pmod_cli.cli.options import AsJson, CacheKind, Device, Dtype, Kernels, options_of
from pmod_cli.devices import check_launch
from pmod_cli.evaluation.options import EvalOptions
from pmod_cli.extras import starting


@app.command(
    "eval",
    epilog=examples(
        "pmod eval ./pmod-llava-1.5-7b --tasks paper --baseline llava-hf/llava-1.5-7b-hf --output results",
        "pmod eval ./pmod-llava-1.5-7b --tasks gqa,pope_full --limit 100 --min gqa=60",
        "pmod eval --prepare --tasks paper",
        "pmod eval --diff results-before results-after",
    ),
)
@options_of(
    EvalOptions,
    model=typer.Argument(help="Checkpoint folder or hub id, dense or p-MoD.", show_default=False),
    tasks="lmms-eval task names, separated by commas; paper for the paper's 14.",
    baseline="A checkpoint to compare with, evaluated the same way.",
    output="Folder for answers and results; a rerun goes on from there.",
    batch_size="Samples per batch, or auto.",
    limit="First N documents of each task; below 1, that share of them.",
    include_path="Folder with more task YAML; repeatable.",
    minimum=Annotated[
        list[str] | None, typer.Option("--min", help="task=score: exit 1 if the score is lower; repeatable.")
    ],
    max_drop="Exit 1 if a task drops by more points below the baseline.",
    max_new_tokens=typer.Option(min=1, help="Upper limit on the tasks' own."),
    dtype=Dtype,
    device=Device,
    kernels=Kernels,
    cache=CacheKind,
    offline="Never ask the network.",
    prepare="Only download what the tasks (and MODEL) need.",
    diff=typer.Option(help="Two output folders: list the samples whose score changed.", show_default=False),
    force="Start over: forget kept answers, replace other models' results in --output.",
    as_json=AsJson,
)
def evaluate_command(options: EvalOptions) -> None:
    """Evaluate a model on lmms-eval's benchmarks, beside its baseline.

    Exit code 1 if a sample failed or a limit was not met.
    """
    check_launch()
    if options.offline:
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # before anything is imported
    os.environ.setdefault("TQDM_DISABLE", "1")  # one progress bar is enough
    with starting("eval"):
        from pmod_cli.evaluation.command import run
    run(options)
