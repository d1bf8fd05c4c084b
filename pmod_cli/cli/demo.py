"""``pmod demo``: the whole job on the embedded example."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from pmod_cli.cli.app import app, examples
from pmod_cli.extras import starting
from pmod_cli.output.console import emit_json, stderr, stdout
from pmod_cli.output.errors import GateError, PmodError


@app.command(
    "demo",
    epilog=examples(
        "pmod demo",
        "pmod demo --output /tmp/demo --steps 100 --json",
    ),
)
def demo_command(
    output: Annotated[Path, typer.Option("--output", help="Everything goes under this folder.")] = Path(
        "pmod-demo"
    ),
    steps: Annotated[int, typer.Option("--steps", min=1, help="Fine-tuning steps of each model.")] = 200,
    train_images: Annotated[
        int, typer.Option("--train-images", min=1, help="Pictures to fine-tune on.")
    ] = 1600,
    heldout_images: Annotated[
        int, typer.Option("--heldout-images", min=2, help="Pictures to evaluate on.")
    ] = 120,
    train_baseline: Annotated[
        bool, typer.Option("--train-baseline", help="Only train the baseline anew, into OUTPUT/baseline.")
    ] = False,
    baseline_steps: Annotated[
        int | None, typer.Option("--baseline-steps", min=2, help="With --train-baseline: fewer steps.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="With --train-baseline: the seed.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Turn a small trained LLaVA into a p-MoD model, fine-tune, profile and evaluate it. No GPU, no network.

    Exits 1 if a target of the example is missed. A second run reuses what is finished.
    """
    if train_baseline:
        result = _train_baseline(output, baseline_steps, seed)
        if as_json:
            emit_json("demo", result)
        else:
            stdout.print(f"held-out accuracy {100 * result['heldout']['overall']:.1f} %: {result['model']}")
        return
    # Nothing is downloaded: the libraries' own bars, for files that load in no time, would only hide ours. They
    # read this when they are imported.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", "Cannot enable progress bars")
    with starting("demo"):
        from pmod_cli.demo.job import DemoSettings, run_demo

    settings = DemoSettings(train_images, heldout_images, steps)
    report = run_demo(output, settings, lambda line: stderr.print(line, soft_wrap=True))
    if as_json:
        emit_json("demo", report)
    else:
        _print(report)
    missed = [target["name"] for target in report["targets"] if not target["met"]]
    if missed:
        raise GateError(f"missed: {'; '.join(missed)}", "see the targets below the table")


def _train_baseline(output: Path, steps: int | None, seed: int) -> dict[str, Any]:
    from rich.progress import Progress

    with starting("demo"):
        from pmod_cli.demo.baseline import train_baseline

    folder = output / "baseline"
    if folder.exists():
        raise PmodError(f"{folder} exists", "remove it or choose another --output")
    with Progress(console=stderr) as bars:
        bar = bars.add_task("training the baseline")

        def advance(done: int, total: int, figures: dict[str, float]) -> None:
            text = f"training the baseline, loss {figures['loss']:.3f}"
            bars.update(bar, completed=done, total=total, description=text)

        summary = train_baseline(folder, steps=steps, seed=seed, progress=advance)
    return {"model": str(folder), **summary}


def _print(report: dict[str, Any]) -> None:
    from rich.table import Table

    caption = f"FLOPs and KV cache of one sample; times of a batch of {report['batch']}"
    table = Table(
        title="p-MoD on the embedded example",
        title_justify="left",
        caption=caption,
        caption_justify="left",
    )
    table.add_column("")
    for row in report["rows"]:
        table.add_column(row["model"], justify="right")
    for kind in ("exact_match", *report["kinds"]):
        label = "accuracy, %" if kind == "exact_match" else f"  {kind}"
        table.add_row(label, *(f"{row['accuracy'][kind]:.1f}" for row in report["rows"]))
    table.add_section()
    costs = [
        ("prefill, MFLOPs", "prefill_flops", 1e-6, 1),
        ("KV cache, kB", "kv_bytes", 1e-3, 1),
        ("prefill, ms", "prefill_seconds", 1e3, 1),
        ("decode step, ms", "decode_seconds_per_token", 1e3, 2),
        ("parameters, M", "parameters", 1e-6, 3),
    ]
    for label, key, scale, digits in costs:
        table.add_row(label, *(f"{scale * row[key]:.{digits}f}" for row in report["rows"]))
    stdout.print(table)
    ratios = report["ratios"]
    stdout.print(
        f"p-MoD / dense: prefill FLOPs {ratios['prefill_flops']:.3f}, KV cache {ratios['kv_prefill']:.3f}, "
        f"prefill time {ratios['prefill_seconds']:.3f}, decode time {ratios['decode_seconds']:.3f}; "
        f"wall time {report['wall_seconds']:.0f} s"
    )
    for target in report["targets"]:
        mark = "[green]met[/green]" if target["met"] else "[red]missed[/red]"
        stdout.print(f"{mark}  {target['name']}: {target['value']:.2f}, wanted {target['wanted']}")
    for name, path in report["files"].items():
        stdout.print(f"{name}: {path}", soft_wrap=True)
