"""``pmod inspect``: what a p-MoD checkpoint says of itself."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pmod_cli.cli.app import app, examples
from pmod_cli.cli.options import AsJson, Revision
from pmod_cli.extras import starting
from pmod_cli.output.console import emit_json, show_lines, stdout
from pmod_cli.output.tables import Table
from pmod_cli.output.units import share


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

    found = inspect_checkpoint(model, revision)
    if as_json:
        emit_json("inspect", found)
        return
    rows = [_row(layer, found["mod"]["router_bias"]) for layer in found["layers"]]
    header = ["layer", "kind", "retention", "|weight|", "max", "bias", "router"]
    show_lines(found["model"])
    stdout.print(Table("", header, rows, left=2).to_rich())
    routers = sum("router" in layer for layer in found["layers"])
    show_lines(
        f"family {found['family']}, mean retention {share(found['mean_retention'])}"
        f"{_coverage(found['mod']['coverage'])}"
        f"{', tokens kept at random' if found['mod']['choice'] == 'random' else ''}",
        f"{routers} routers, {found['router_parameters']:,} parameters ({found['router_dtype']}), "
        f"{found['initial_routers']} still at their initial value ({100 * found['initial_share']:.0f} %)",
        _origin(found["provenance"]),
    )
    if training := found["training"]:
        show_lines(
            f"fine-tuned from {training['model']}: {training['steps']} steps, "
            f"final loss {_number(training['final_loss'])}"
        )


def _row(layer: dict[str, Any], with_bias: bool) -> list[str]:
    if "router" not in layer:
        return [str(layer["layer"]), "dense", "", "", "", "", ""]
    router = layer["router"]
    return [
        str(layer["layer"]),
        "MoD",
        f"{layer['retention_ratio']:.4f}",
        _number(router["weight_norm"]),
        _number(router["weight_max"]),
        _number(router["bias"]) if with_bias else "",
        "initial" if router["initial"] else "trained",
    ]


def _coverage(coverage: float | list[float]) -> str:
    if not isinstance(coverage, list):
        coverage = [coverage]
    low, high = min(coverage), max(coverage)
    span = f"{low:g}" if low == high else f"{low:g} to {high:g}"
    return f", coverage {span}" if high else ""


def _origin(origin: dict[str, Any] | None) -> str:
    if not origin:
        return "its config does not say where it comes from"
    recipe = origin.get("recipe")
    recipe = recipe.get("name") if isinstance(recipe, dict) else None
    commit = f" at {origin['revision']}" if origin.get("revision") else ""
    kept = "calibrated" if origin.get("calibration") else "its own routers and ratios"
    how = f"recipe {recipe}" if recipe else kept
    return (
        f"from {origin.get('source')}{commit} ({origin.get('format')}), {how}, pmod {origin.get('version')}"
    )


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"
