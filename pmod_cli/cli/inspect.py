"""``pmod inspect``: what a p-MoD checkpoint says of itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pmod_cli.cli.app import app, examples
from pmod_cli.extras import starting
from pmod_cli.output.console import emit_json, stdout

if TYPE_CHECKING:
    from pmod_cli.conversion.inspection import Inspection


@app.command(
    "inspect",
    epilog=examples(
        "pmod inspect ./pmod-llava-1.5-7b",
        "pmod inspect ./pmod-llava-1.5-7b --json | jq .result.initial_share",
    ),
)
def inspect_command(
    model: Annotated[str, typer.Argument(help="p-MoD checkpoint: a folder or hub id.")],
    revision: Annotated[str | None, typer.Option("--revision", help="Hub branch, tag or commit.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Show a p-MoD checkpoint's layers, routers and origin. Only the routers are read."""
    with starting("inspect"):
        from pmod_cli.conversion.inspection import inspect_checkpoint

    inspection = inspect_checkpoint(model, revision)
    if as_json:
        emit_json("inspect", inspection.to_dict())
    else:
        _show(inspection)


def _show(inspection: Inspection) -> None:
    from rich.table import Table

    table = Table("layer", "kind", "retention", "|weight|", "max", "bias", "router")
    for column in table.columns[2:6]:
        column.justify = "right"
    for row in inspection.layers:
        router = row.get("router")
        if router is None:
            table.add_row(str(row["layer"]), "dense", "", "", "", "", "")
            continue
        table.add_row(
            str(row["layer"]),
            "MoD",
            f"{row['retention_ratio']:.4f}",
            _number(router["weight_norm"]),
            _number(router["weight_max"]),
            _number(router["bias"]) if inspection.mod["router_bias"] else "",
            "initial" if router["initial"] else "trained",
        )
    stdout.print(f"{inspection.model}", markup=False, soft_wrap=True)
    stdout.print(table)
    routers = sum("router" in row for row in inspection.layers)
    origin, training = inspection.provenance, inspection.training
    lines = [
        f"family {inspection.family}, mean retention {100 * inspection.mean_retention:.2f} %",
        f"{routers} routers, {inspection.router_parameters:,} parameters ({inspection.router_dtype}), "
        f"{inspection.initial_routers} still at their initial value ({100 * inspection.initial_share:.0f} %)",
    ]
    if origin:
        recipe = (origin.get("recipe") or {}).get("name")
        commit = f" at {origin['revision']}" if origin.get("revision") else ""
        how = f"recipe {recipe}" if recipe else "its own routers and ratios"
        lines.append(
            f"from {origin.get('source')}{commit} ({origin.get('format')}), {how}, pmod {origin.get('version')}"
        )
    else:
        lines.append("its config does not say where it comes from")
    if training:
        lines.append(
            f"fine-tuned from {training['model']}: {training['steps']} steps, "
            f"final loss {_number(training['final_loss'])}"
        )
    for line in lines:
        stdout.print(line, markup=False, soft_wrap=True)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"
