"""``pmod calibrate``: p-MoD without training."""

from __future__ import annotations

from typing import Any

import typer

from pmod_cli.calibration.options import CalibrateOptions
from pmod_cli.cli.app import app, examples
from pmod_cli.cli.options import AsJson, Device, Dtype, Images, MaxNewTokens, options_of
from pmod_cli.extras import starting
from pmod_cli.output.console import emit_json, show_lines, stdout, tell
from pmod_cli.output.errors import GateError
from pmod_cli.output.progress import late_progress
from pmod_cli.output.tables import Table
from pmod_cli.output.units import share


@app.command(
    "calibrate",
    epilog=examples(
        "pmod calibrate llava-hf/llava-1.5-7b-hf --data llava_v1_5_mix665k.json --images data --output calibrated",
        "pmod calibrate ./my-llava --data mine.json --images pictures --output out --flops 0.5 --min-agreement 0.9",
    ),
)
@options_of(
    CalibrateOptions,
    model=typer.Argument(help="Checkpoint folder or hub id, dense or p-MoD."),
    data="LLaVA JSON or JSONL; or a datasets folder or hub id. Answers are not used.",
    images=Images,
    output=typer.Option("--output", "-o", help="Folder of the new checkpoint."),
    samples="Questions, divided in three: to fit, to choose, to judge.",
    flops="Prefill FLOPs that may be left, as a share of dense: ratios are searched.",
    kv="The same for the KV cache.",
    schedule=typer.Option(
        help="Without a budget: own (of a p-MoD MODEL) or paper.", show_default="own, else paper"
    ),
    min_agreement="Exit 1 if fewer of the greedy answers (0 to 1) are the dense model's.",
    max_new_tokens=MaxNewTokens,
    batch_size=typer.Option(min=1, help="Samples per batch."),
    seed="Of the questions drawn.",
    dtype=Dtype,
    device=Device,
    force=typer.Option(help="Replace the checkpoint at --output."),
    as_json=AsJson,
)
def calibrate_command(options: CalibrateOptions) -> None:
    """Fit routers and find retention ratios without training, held against spread and random selection."""
    with starting("calibrate"):
        from pmod_cli.calibration.calibrate import calibrate
    with late_progress() as show:
        result = calibrate(options, show)
    if options.as_json:
        emit_json("calibrate", result)
    else:
        _show(result)
    agreement = result["agreement"]["mean"]
    if options.min_agreement is not None and agreement < options.min_agreement:
        raise GateError(
            f"agreement {agreement:.3f} is below --min-agreement {options.min_agreement:g}",
            f"{options.output} is written all the same",
        )


def _show(result: dict[str, Any]) -> None:
    asked = result["questions"]
    rows = [
        [row["name"], _kl(row["divergence"]), _percent(row["agreement"]), _gain(row["gain"])]
        for row in result["selections"]
    ]
    title = f"schedule {result['schedule']}, {share(result['flops'])} of prefill FLOPs, {share(result['kv'])} of KV"
    header = ["selection", "KL from dense", "answers as dense, %", "KL more than fitted"]
    stdout.print(Table(title, header, rows).to_rich())
    if result["schedules"]:
        rows = [
            [
                row["name"],
                share(row["flops"]),
                share(row["kv"]),
                _kl(row["divergence"]),
                _percent(row["agreement"]),
            ]
            for row in result["schedules"]
        ]
        header = ["schedule", "FLOPs", "KV", "KL from dense", "answers as dense, %"]
        stdout.print(Table("schedules at that budget", header, rows).to_rich())
    if result["replaced"]:
        verdict = f"routers fitted to the attention of text, coverage {result['strength']:g}: better than each control"
    else:
        verdict = (
            f"routers kept as they were: fitted ones are not better than {', '.join(result['not_beaten'])}"
        )
    show_lines(
        verdict,
        f"judged on {asked['judge']} questions; fitted to {asked['fit']}, chosen on {asked['choose']} others",
        f"{result['destination']}: {result['seconds']:.0f} s",
    )
    for note in result["notes"]:
        tell(f"note: {note}")


def _kl(value: dict[str, float]) -> str:
    return f"{value['mean']:.4f} ({value['low']:.4f} to {value['high']:.4f})"


def _percent(value: dict[str, float]) -> str:
    return f"{100 * value['mean']:.1f} ({100 * value['low']:.1f} to {100 * value['high']:.1f})"


def _gain(gain: dict[str, Any] | None) -> str:
    return "" if gain is None else _kl(gain["divergence"])
