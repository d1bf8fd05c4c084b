"""``pmod doctor``: what this machine can do."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pmod_cli.cli.app import app, examples
from pmod_cli.output.console import emit_json, stderr, stdout
from pmod_cli.output.errors import PmodError


@app.command(
    "doctor",
    epilog=examples(
        "pmod doctor",
        "pmod doctor --json",
    ),
)
def doctor_command(
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout", min=0.1, help="Seconds that the import of one package may take; 30 by default."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Say what works on this machine, what is missing, and the command that mends it. Asks no network.

    Exit code 2 if something that is installed does not work.
    """
    from pmod_cli.doctor.examine import examine

    with stderr.status("importing what is installed"):
        told = examine() if timeout is None else examine(timeout)
    if as_json:
        emit_json("doctor", told)
    else:
        _show(told)
    if not told["ok"]:
        raise PmodError(*_summary(told))


def _summary(told: dict[str, Any]) -> tuple[str, str | None]:
    """The line on stderr: the first of what is broken, and what mends it."""
    bad = [
        package
        for package in told["packages"]
        if package["status"] == "broken" or (package["status"] == "missing" and not package["optional"])
    ]
    if bad:
        names = ", ".join(package["name"] for package in bad)
        first = bad[0]["error"] or "it is not installed"
        return f"does not work: {names}; the first: {first}", bad[0]["remedy"]
    for command in told["commands"]:
        if not command["works"] and not str(command["reason"]).endswith("is not installed"):
            return str(command["reason"]), command["remedy"]
    name, reason = next(iter(told["not_found_out"].items()))
    return f"{name}: {reason}", None


def _show(told: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    marks = {"works": "[green]works[/green]", "missing": "not installed", "broken": "[red]broken[/red]"}
    table = Table(
        "package", "version", "", "what is wrong, what mends it", title="Installed", title_justify="left"
    )
    table.add_row("python", told["python"], marks["works"], "")
    for package in told["packages"]:
        parts = [part for part in (package["error"], package["remedy"]) if part]
        row = (package["name"], package["version"] or "", marks[package["status"]], escape("\n".join(parts)))
        table.add_row(*row)
    stdout.print(table)
    for line in _machine(told):
        stdout.print(line, markup=False, soft_wrap=True)
    table = Table("command", "", "why, what mends it", title="Commands", title_justify="left")
    for command in told["commands"]:
        parts = [part for part in (command["reason"], command["remedy"]) if part]
        parts += [f"{limit['what']}: {limit['remedy']}" for limit in command["limits"]]
        mark = marks["works"] if command["works"] else "[red]does not[/red]"
        table.add_row(command["command"], mark, escape("\n".join(parts)))
    stdout.print(table)


def _machine(told: dict[str, Any]) -> list[str]:
    """Lines about GPUs, attention, caches and the network; and a warning a version out of bounds."""
    lines = [
        f"warning: {outside['name']} {outside['installed']} is installed, {outside['wanted']} is wanted: "
        f"{outside['remedy']}"
        for outside in told["bounds"]
    ]
    for index, gpu in enumerate(told["gpus"]):
        bf16 = "bf16" if gpu["bf16"] else "no bf16"
        lines.append(f"GPU {index}: {gpu['name']}, {gpu['memory_bytes'] / 2**30:.1f} GiB, {bf16}")
    if told["gpus"]:
        lines.append(
            f"driver {told['driver'] or 'unknown'}, torch built for CUDA {told['cuda'] or 'no CUDA'}"
        )
    else:
        lines.append(f"GPU: none{': ' + told['why_no_gpu'] if told['why_no_gpu'] else ''}; pmod uses the CPU")
    if told["attention"]:
        lines.append(f"attention: {told['attention']['implementation']}: {told['attention']['why']}")
    for cache in told["caches"]:
        free = "" if cache["free_bytes"] is None else f", {cache['free_bytes'] / 2**30:.1f} GiB free"
        lines.append(f"{cache['what']}: {cache['path'] or 'needs datasets'}{free}")
    if told["offline"] is not None:
        how = "off (HF_HUB_OFFLINE)" if told["offline"] else "may be asked"
        lines.append(f"network: {how}")
    lines += [f"not found out: {name}: {reason}" for name, reason in told["not_found_out"].items()]
    return lines
