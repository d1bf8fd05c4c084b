"""``pmod demo``: the whole job on the embedded example."""

from __future__ import annotations

import gc
import os
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from pmod_cli.cli.app import app, examples
from pmod_cli.cli.options import AsJson
from pmod_cli.devices import check_launch
from pmod_cli.extras import starting
from pmod_cli.output.console import emit_json, show_lines, stderr, stdout
from pmod_cli.output.errors import GateError
from pmod_cli.output.progress import late_progress
from pmod_cli.output.tables import Table
from pmod_cli.output.units import share

_MOST = 100_000


@app.command(
    "demo",
    epilog=examples(
        "pmod demo",
        "pmod demo --output /tmp/demo --steps 60 --json",
    ),
)
def demo_command(
    output: Annotated[Path, typer.Option("--output", help="Everything goes under this folder.")] = Path(
        "pmod-demo"
    ),
    steps: Annotated[
        int, typer.Option("--steps", min=1, max=_MOST, help="Most fine-tuning steps of a model.")
    ] = 100,
    train_images: Annotated[
        int, typer.Option("--train-images", min=5, max=_MOST, help="Pictures to calibrate and fine-tune on.")
    ] = 1600,
    heldout_images: Annotated[
        int, typer.Option("--heldout-images", min=2, max=_MOST, help="Pictures to evaluate on.")
    ] = 120,
    as_json: AsJson = False,
) -> None:
    """Make p-MoD models of a small trained LLaVA, profile and evaluate them. No GPU, no network.

    Exits 1 if a target of the example is missed. A second run reuses what is finished.
    """
    check_launch()
    # Nothing is downloaded, and one progress bar is enough: the libraries' own would hide ours. They read this when
    # they are imported.
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        os.environ.setdefault(name, "1")
    warnings.filterwarnings("ignore", "Cannot enable progress bars")
    with starting("demo"):
        from pmod_cli.demo.job import DemoSettings, run_demo

    gc.freeze()  # imports are no garbage, which each evaluation would look through again
    settings = DemoSettings(train_images, heldout_images, steps)
    with late_progress() as show:
        report = run_demo(output, settings, lambda line: stderr.print(line, soft_wrap=True), show)
    if as_json:
        emit_json("demo", report)
    else:
        _print(report)
    missed = [target["name"] for target in report["targets"] if not target["met"]]
    if missed:
        raise GateError(f"missed: {'; '.join(missed)}", "see the targets below the table")


def _print(report: dict[str, Any]) -> None:
    rows = []
    for kind in ("exact_match", *report["kinds"]):
        label = "accuracy, %" if kind == "exact_match" else f"  {kind}"
        rows.append([label, *(f"{row['accuracy'][kind]:.1f}" for row in report["rows"])])
    for label, key, scale, digits in (
        ("prefill, MFLOPs", "prefill_flops", 1e-6, 1),
        ("KV cache, kB", "kv_bytes", 1e-3, 1),
        ("prefill, ms", "prefill_seconds", 1e3, 1),
        ("decode step, ms", "decode_seconds_per_token", 1e3, 2),
        ("parameters, M", "parameters", 1e-6, 3),
    ):
        rows.append([label, *(f"{scale * row[key]:.{digits}f}" for row in report["rows"])])
    header = ["", *(row["model"] for row in report["rows"])]
    stdout.print(Table("p-MoD on the embedded example", header, rows).to_rich())
    ratios = report["ratios"]
    show_lines(
        f"FLOPs and KV cache of one sample; times of a batch of {report['batch']}",
        f"p-MoD / dense: prefill FLOPs {ratios['prefill_flops']:.3f}, KV cache {ratios['kv_prefill']:.3f}, "
        f"prefill time {ratios['prefill_seconds']:.3f}, decode time {ratios['decode_seconds']:.3f}; "
        f"wall time {report['wall_seconds']:.0f} s",
    )
    _print_tight(report)
    for target in report["targets"]:
        mark = "[green]met[/green]" if target["met"] else "[red]missed[/red]"
        stdout.print(f"{mark}  {target['name']}: {target['value']:.2f}, wanted {target['wanted']}")
    show_lines(*(f"{name}: {path}" for name, path in report["files"].items()))


def _print_tight(report: dict[str, Any]) -> None:
    """Accuracy against FLOPs: the dense control, and each way to a p-MoD model at each budget."""
    control = next(row["accuracy"]["exact_match"] for row in report["rows"] if "control" in row["model"])
    rows = [["dense, fine-tuned (control)", "", "100.0", f"{control:.1f}", "", ""]]
    for budget in report["tight"]:
        for row in budget["rows"]:
            found = [_interval(row["accuracy"], ""), *(_interval(row[key], "+") for key in _OVER)]
            rows.append([row["model"], budget["name"], f"{100 * budget['flops']:.1f}", *found])
    header = ["", "budget", "FLOPs, %", "accuracy, %", *_OVER.values()]
    stdout.print(Table("where few vision tokens are kept (95 % intervals)", header, rows, left=2).to_rich())
    for budget in report["tight"]:
        ratios = ", ".join("dense" if ratio is None else f"{ratio:g}" for ratio in budget["ratios"])
        show_lines(f"{budget['name']}: KV cache {share(budget['kv'])}; by layer {ratios}")


_OVER = {"over_random": "over random", "over_dense": "over dense"}


def _interval(found: dict[str, float] | None, sign: str) -> str:
    if found is None:
        return ""
    return f"{found['points']:{sign}.1f} ({found['low']:{sign}.1f} to {found['high']:{sign}.1f})"
