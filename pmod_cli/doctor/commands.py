"""What each command imports, and whether it works here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pmod_cli.doctor.packages import PACKAGES, REQUIRED
from pmod_cli.extras import install_command


@dataclass(frozen=True)
class Command:
    """A command and the packages that it takes.

    Attributes:
        name: As it is typed.
        modules: What it imports of pmod.
        needs: Optional packages without which it does not run.
        uses: Optional packages that it imports if they are there, asked or not.
        without: Optional package -> what it does, or cannot do, without it.
        extras: Optional package -> the extra to install for this command, where it is not the package's first.
    """

    name: str
    modules: tuple[str, ...]
    needs: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    without: Mapping[str, str] = field(default_factory=dict)
    extras: Mapping[str, str] = field(default_factory=dict)


_FINETUNE, _VISUALIZE = "pmod_cli.training.finetune", "pmod_cli.visualize.visualize"
_PROFILE = ("pmod_cli.profiling.profile", "pmod_cli.profiling.latency")
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
        Command("finetune", (_FINETUNE,), (), ("peft",), _TRAINING, {"datasets": "train"}),
        Command("profile", _PROFILE, (), ("fvcore",), _PROFILING),
        Command("eval", ("pmod_cli.evaluation.evaluate",), ("lmms_eval", "datasets")),
        Command("generate", ("pmod_cli.generation",)),
        Command(
            "serve", ("pmod_cli.generation", "pmod_cli.serving.request"), ("fastapi", "uvicorn", "openai")
        ),
        Command("visualize", (_VISUALIZE,), without={"matplotlib": "only --html"}),
        Command("report", ("pmod_cli.report.write",), ("matplotlib",)),
        Command(
            "demo",
            ("pmod_cli.demo.job", _FINETUNE, _VISUALIZE),
            needs=_DEMO,
            uses=("peft",),
            extras=dict.fromkeys(_DEMO, "all"),
        ),
    )
}


def verdict(command: Command, found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Whether a command works here, from the results of all checks by their names (see `pmod_cli.doctor.checks`).

    Returns:
        ``command``, ``works``; ``reason`` and ``remedy`` where it does not; ``limits``: what it cannot do although
        it works, each with ``what`` and ``remedy``.
    """
    # Optional package -> what is wrong with it, and its remedy.
    problems = {}
    for root, package in PACKAGES.items():
        result = found[f"package {root}"]
        how = {"missing": "is not installed", "broken": "is broken"}.get(result["status"])
        if how:
            other = command.extras.get(root) if result["status"] == "missing" else None
            problems[root] = f"{package.name} {how}", install_command(other) if other else result["remedy"]
    broken = [root for root in command.uses if found[f"package {root}"]["status"] == "broken"]
    own = found[f"command {command.name}"]
    obstacles = [problems[root] for root in (*REQUIRED, *command.needs, *broken) if root in problems]
    if own["status"] != "works":
        obstacles.append((own["error"], own["remedy"]))
    reason, remedy = obstacles[0] if obstacles else (None, None)
    limits = [
        {"what": f"{what} ({problems[root][0]})", "remedy": problems[root][1]}
        for root, what in command.without.items()
        if root in problems and not obstacles
    ]
    return {
        "command": command.name,
        "works": not obstacles,
        "reason": reason,
        "remedy": remedy,
        "limits": limits,
    }
