"""``pmod doctor``: what this machine can do."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pmod_cli.cli.app import app, examples
from pmod_cli.cli.options import AsJson
from pmod_cli.output.console import emit_json, show_lines, stderr, stdout
from pmod_cli.output.errors import PmodError
from pmod_cli.output.text import plain


@app.command(
    "doctor",
    epilog=examples(
        "pmod doctor",
        "pmod doctor --json",
    ),
)
def doctor_command(
    timeout: Annotated[
        float, typer.Option("--timeout", min=0.1, help="Seconds that the import of one package may take.")
    ] = 30,
    as_json: AsJson = False,
) -> None:
    """Show what works on this machine, what is missing, and the command that mends it. Asks no network.

    Exit code 2 if something that is installed does not work.
    """
    from pmod_cli.doctor.examine import examine

    with stderr.status("importing what is installed"):
        result = examine(timeout)
    if as_json:
        emit_json("doctor", result)
    else:
        _show(result)
    if not result["ok"]:
        raise PmodError(*_first_problem(result))


def _first_problem(result: dict[str, Any]) -> tuple[str, str | None]:
    """What is broken, in a line, and what mends the first of it."""
    needed = [each for each in result["packages"] if each["status"] == "broken" or not each["optional"]]
    bad = [package for package in needed if package["status"] != "works"]
    if bad:
        names = ", ".join(package["name"] for package in bad)
        first = bad[0]["error"] or "it is not installed"
        return f"does not work: {names}; the first: {first}", bad[0]["remedy"]
    for command in result["commands"]:
        if not command["works"] and not str(command["reason"]).endswith("is not installed"):
            return str(command["reason"]), command["remedy"]
    name, reason = next(iter(result["not_found_out"].items()))
    return f"{name}: {reason}", None


_MARKS = {"works": "[green]works[/green]", "missing": "not installed", "broken": "[red]broken[/red]"}


def _show(result: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    # Tables that wrap their last column, which may hold anything and is not markup.
    table = Table(
        "package", "version", "", "what is wrong, what mends it", title="Installed", title_justify="left"
    )
    table.add_row("python", result["python"], _MARKS["works"], "")
    for package in result["packages"]:
        notes = "\n".join(filter(None, (package["error"], package["remedy"])))
        table.add_row(
            package["name"], package["version"] or "", _MARKS[package["status"]], escape(plain(notes))
        )
    stdout.print(table)
    show_lines(*_machine(result))
    table = Table("command", "", "why, what mends it", title="Commands", title_justify="left")
    for command in result["commands"]:
        limits = [f"{limit['what']}: {limit['remedy']}" for limit in command["limits"]]
        notes = "\n".join(filter(None, (command["reason"], command["remedy"], *limits)))
        mark = _MARKS["works"] if command["works"] else "[red]does not[/red]"
        table.add_row(command["command"], mark, escape(plain(notes)))
    stdout.print(table)


def _machine(result: dict[str, Any]) -> list[str]:
    """Lines about versions out of bounds, GPUs, attention, caches and the network."""
    lines = [
        f"warning: {outside['name']} {outside['installed']} is installed, {outside['wanted']} is wanted: "
        f"{outside['remedy']}"
        for outside in result["bounds"]
    ]
    for index, gpu in enumerate(result["gpus"]):
        bf16 = "bf16" if gpu["bf16"] else "no bf16"
        lines.append(f"GPU {index}: {gpu['name']}, {gpu['memory_bytes'] / 2**30:.1f} GiB, {bf16}")
    if result["gpus"]:
        driver, cuda = result["driver"] or "unknown", result["cuda"] or "no CUDA"
        lines.append(f"driver {driver}, torch built for CUDA {cuda}")
    else:
        why = f": {result['why_no_gpu']}" if result["why_no_gpu"] else ""
        lines.append(f"GPU: none{why}; pmod uses the CPU")
    if result["attention"]:
        lines.append(f"attention: {result['attention']['implementation']}: {result['attention']['why']}")
    for cache in result["caches"]:
        free = "" if cache["free_bytes"] is None else f", {cache['free_bytes'] / 2**30:.1f} GiB free"
        lines.append(f"{cache['what']}: {cache['path'] or 'needs datasets'}{free}")
    if result["offline"] is not None:
        lines.append(f"network: {'off (HF_HUB_OFFLINE)' if result['offline'] else 'may be asked'}")
    return lines + [f"could not find out: {name}: {why}" for name, why in result["not_found_out"].items()]
