"""What each verb imports, and whether it works here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pmod_cli.bounds import install_command
from pmod_cli.doctor.packages import PACKAGES, REQUIRED


@dataclass(frozen=True)
class Command:
    """A verb and the packages that it takes.

    Attributes:
        name: The verb.
        modules: What it imports of pmod.
        needs: Optional packages without which it does not run.
        uses: Optional packages that it imports if they are there, asked or not.
        without: Optional package -> what the verb does, or cannot do, without it.
        extras: Optional package -> the extra to install for this verb, where it is not the package's first.
    """

    name: str
    modules: tuple[str, ...]
    needs: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    without: Mapping[str, str] = field(default_factory=dict)
    extras: Mapping[str, str] = field(default_factory=dict)


_TRAINING = {
    "peft": "no LoRA",
    "datasets": "no parquet or hub data, only JSON",
    "tensorboard": "no TensorBoard log",
    "matplotlib": "no training.png",
}
_PROFILING = {"fvcore": "counts by formula", "matplotlib": "no --plot"}
_DEMO = ("lmms_eval", "datasets", "fvcore", "matplotlib")

COMMANDS = {
    command.name: command
    for command in (
        Command("convert", ("pmod_cli.conversion.convert",)),
        Command(
            "finetune",
            ("pmod_cli.training.finetune",),
            uses=("peft",),
            without=_TRAINING,
            extras={"datasets": "train"},
        ),
        Command(
            "profile",
            ("pmod_cli.profiling.profile", "pmod_cli.profiling.latency"),
            uses=("fvcore",),
            without=_PROFILING,
        ),
        Command("eval", ("pmod_cli.evaluation.evaluate",), needs=("lmms_eval", "datasets")),
        Command("generate", ("pmod_cli.generation",)),
        Command("visualize", ("pmod_cli.visualize.visualize",), without={"matplotlib": "only --html"}),
        Command("report", ("pmod_cli.report.write",), needs=("matplotlib",)),
        Command(
            "demo",
            ("pmod_cli.demo.job", "pmod_cli.training.finetune", "pmod_cli.visualize.visualize"),
            needs=_DEMO,
            uses=("peft",),
            extras=dict.fromkeys(_DEMO, "all"),
        ),
    )
}


def verdict(command: Command, found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Whether a verb works here.

    Args:
        command: The verb.
        found: Results of the checks, by their names (see `pmod_cli.doctor.checks`).

    Returns:
        ``command``, ``works``; ``reason`` and ``remedy`` where it does not; ``limits``: what it cannot do although
        it works, each with ``what`` and ``remedy``.
    """
    reason, remedy = _obstacle(command, found)
    limits = []
    for root, what in command.without.items() if reason is None else ():
        if problem := _problem(root, found):
            limits.append({"what": f"{what} ({problem})", "remedy": _remedy(command, root, found)})
    return {
        "command": command.name,
        "works": reason is None,
        "reason": reason,
        "remedy": remedy,
        "limits": limits,
    }


def _obstacle(command: Command, found: Mapping[str, Mapping[str, Any]]) -> tuple[str | None, str | None]:
    """The first reason why a verb does not work, and its remedy."""
    for root in (*REQUIRED, *command.needs, *command.uses):
        optional = root not in REQUIRED and root not in command.needs
        if optional and found[f"package {root}"]["status"] == "missing":
            continue
        if problem := _problem(root, found):
            return problem, _remedy(command, root, found)
    own = found[f"command {command.name}"]
    return (None, None) if own["status"] == "works" else (own["error"], own["remedy"])


def _problem(root: str, found: Mapping[str, Mapping[str, Any]]) -> str | None:
    status = found[f"package {root}"]["status"]
    problems = {
        "missing": f"{PACKAGES[root].name} is not installed",
        "broken": f"{PACKAGES[root].name} is broken",
    }
    return problems.get(status)


def _remedy(command: Command, root: str, found: Mapping[str, Mapping[str, Any]]) -> str | None:
    result = found[f"package {root}"]
    if result["status"] == "missing" and root in command.extras:
        return install_command(command.extras[root])
    remedy: str | None = result["remedy"]
    return remedy
