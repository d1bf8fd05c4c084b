"""What each verb imports, and whether it works here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pmod_cli.bounds import install_command
from pmod_cli.doctor.packages import PACKAGES, REQUIRED


@dataclass(frozen=True)
class Command:
    """A verb and what it takes.

    Attributes:
        name: The verb.
        modules: What it imports of pmod.
        needs: Optional packages without which it does not run.
        uses: Optional packages that it imports if they are there, asked or not.
        without: Optional package -> what the verb does, or does not, without it.
        extras: Optional package -> the extra to install for this verb, where it is not the package's first.
    """

    name: str
    modules: tuple[str, ...]
    needs: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    without: Mapping[str, str] = field(default_factory=dict)
    extras: Mapping[str, str] = field(default_factory=dict)


COMMANDS = {
    command.name: command
    for command in (
        Command("convert", ("pmod_cli.conversion.convert",)),
        Command(
            "finetune",
            ("pmod_cli.training.finetune",),
            uses=("peft",),
            without={
                "peft": "no LoRA",
                "datasets": "no parquet or hub data, only JSON",
                "tensorboard": "no TensorBoard log",
                "matplotlib": "no training.png",
            },
            extras={"datasets": "train"},
        ),
        Command(
            "profile",
            ("pmod_cli.profiling.profile", "pmod_cli.profiling.latency"),
            uses=("fvcore",),
            without={"fvcore": "counts by formula", "matplotlib": "no --plot"},
        ),
        Command("eval", ("pmod_cli.evaluation.evaluate",), needs=("lmms_eval", "datasets")),
        Command("generate", ("pmod_cli.generation",)),
        Command("visualize", ("pmod_cli.visualize.visualize",), without={"matplotlib": "only --html"}),
        Command("report", ("pmod_cli.report.write",), needs=("matplotlib",)),
        Command(
            "demo",
            ("pmod_cli.demo.job", "pmod_cli.training.finetune", "pmod_cli.visualize.visualize"),
            needs=("lmms_eval", "datasets", "fvcore", "matplotlib"),
            uses=("peft",),
            extras=dict.fromkeys(("lmms_eval", "datasets", "fvcore", "matplotlib"), "all"),
        ),
    )
}


def verdict(command: Command, found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Whether a verb works here.

    Args:
        command: The verb.
        found: Results of the checks, by their names (see `pmod_cli.doctor.checks`).

    Returns:
        ``command``, ``works``; ``reason`` and ``remedy`` where it does not; ``limits``: what is missing from it
        although it works, each with ``what`` and ``remedy``.
    """
    told: dict[str, Any] = {
        "command": command.name,
        "works": True,
        "reason": None,
        "remedy": None,
        "limits": [],
    }
    for root in (*REQUIRED, *command.needs, *command.uses):
        result = found[f"package {root}"]
        allowed = ("works", "missing") if root in command.uses and root not in command.needs else ("works",)
        if result["status"] not in allowed:
            return told | {
                "works": False,
                "reason": _problem(root, result),
                "remedy": _remedy(command, root, result),
            }
    result = found[f"command {command.name}"]
    if result["status"] != "works":
        return told | {"works": False, "reason": result["error"], "remedy": result["remedy"]}
    for root, what in command.without.items():
        result = found[f"package {root}"]
        if result["status"] != "works":
            remedy = _remedy(command, root, result)
            told["limits"].append({"what": f"{what} ({_problem(root, result)})", "remedy": remedy})
    return told


def _problem(root: str, result: Mapping[str, Any]) -> str:
    name = PACKAGES[root].name
    return f"{name} is not installed" if result["status"] == "missing" else f"{name} is broken"


def _remedy(command: Command, root: str, result: Mapping[str, Any]) -> str | None:
    if result["status"] == "missing" and root in command.extras:
        return install_command(command.extras[root])
    remedy: str | None = result["remedy"]
    return remedy
