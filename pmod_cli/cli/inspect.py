"""``pmod inspect``: what a p-MoD checkpoint says of itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pmod_cli.cli.app import app, examples
from pmod_cli.cli.options import AsJson, Revision
from pmod_cli.extras import starting
from pmod_cli.output.console import emit_json, show_lines, stdout
from pmod_cli.output.tables import Table
from pmod_cli.output.units import share

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
    revision: Revision = None,
    as_json: AsJson = False,
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
    rows: list[Sequence[str]] = []
    for row in inspection.layers:
        router = row.get("router")
        if router is None:
            rows.append([str(row["layer"]), "dense", "", "", "", "", ""])
            continue
        rows.append(
            [
                str(row["layer"]),
                "MoD",
                f"{row['retention_ratio']:.4f}",
                _number(router["weight_norm"]),
                _number(router["weight_max"]),
                _number(router["bias"]) if inspection.mod["router_bias"] else "",
                "initial" if router["initial"] else "trained",
            ]
        )
    header = ["layer", "kind", "retention", "|weight|", "max", "bias", "router"]
    show_lines(inspection.model)
    stdout.print(Table("", header, rows, left=2).to_rich())
    routers = sum("router" in row for row in inspection.layers)
    show_lines(
        f"family {inspection.family}, mean retention {share(inspection.mean_retention)}",
        f"{routers} routers, {inspection.router_parameters:,} parameters ({inspection.router_dtype}), "
        f"{inspection.initial_routers} still at their initial value ({100 * inspection.initial_share:.0f} %)",
        _origin(inspection.provenance),
    )
    if training := inspection.training:
        show_lines(
            f"fine-tuned from {training['model']}: {training['steps']} steps, "
            f"final loss {_number(training['final_loss'])}"
        )


def _origin(origin: dict[str, Any] | None) -> str:
    if not origin:
        return "its config does not say where it comes from"
    recipe = (origin.get("recipe") or {}).get("name")
    commit = f" at {origin['revision']}" if origin.get("revision") else ""
    how = f"recipe {recipe}" if recipe else "its own routers and ratios"
    return (
        f"from {origin.get('source')}{commit} ({origin.get('format')}), {how}, pmod {origin.get('version')}"
    )


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"
