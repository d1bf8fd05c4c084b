"""The commands that the documentation shows: fenced blocks, recipe headers, and the help texts' examples."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAUNCHERS = ("torchrun", "accelerate launch")


@dataclass(frozen=True)
class Command:
    """One command line.

    Attributes:
        where: File and line, for messages.
        line: As it stands, continuation lines joined, comment removed.
        arguments: What ``pmod`` gets, launcher and redirection removed.
        block: Number of the fenced block on its page.
    """

    where: str
    line: str
    arguments: list[str]
    block: int = 0


def pages() -> list[Path]:
    """Every page of the documentation."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands_of_page(page: Path) -> list[Command]:
    """The ``pmod`` commands of a page's fenced blocks."""
    found: list[Command] = []
    inside, block = False, 0
    for number, line in _joined(page.read_text(encoding="utf-8").splitlines()):
        if line.lstrip().startswith("```"):
            inside, block = not inside, block + 1
        elif inside:
            found += _commands(f"{page.name}:{number}", line, block)
    return found


def commands_of_recipes() -> list[Command]:
    """The ``pmod`` commands of the recipes' headers (``# convert:  pmod convert ...``)."""
    found: list[Command] = []
    for recipe in sorted((ROOT / "recipes").glob("*.yaml")):
        header = [line for line in recipe.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
        for number, line in _joined([line.lstrip("# ") for line in header]):
            label, separator, command = line.partition(":  ")
            text = (
                command
                if separator and " " not in label.strip().replace(" GPUs", "").replace("two ", "")
                else line
            )
            found += _commands(f"{recipe.name}:{number}", text.strip())
    return found


def commands_of_help(text: str, where: str) -> list[Command]:
    """The ``pmod`` commands of a help text."""
    found: list[Command] = []
    for number, line in _joined(text.splitlines()):
        found += _commands(f"{where}:{number}", line.strip().removeprefix("$ "))
    return found


def _joined(lines: list[str]) -> list[tuple[int, str]]:
    """Numbered lines, those that end in a backslash joined with the next."""
    joined: list[tuple[int, str]] = []
    start, text = 0, ""
    for number, line in enumerate(lines, 1):
        if not text:
            start = number
        text += line
        if text.endswith("\\"):
            text = text[:-1]
            continue
        joined.append((start, text))
        text = ""
    return joined


def _commands(where: str, line: str, block: int = 0) -> list[Command]:
    found = []
    for part in re.split(r"\s&&\s", line.strip()):
        part = re.sub(r"(\s|^)#\s.*$", "", part.strip())
        part = re.sub(r"\s+\((as above|SRC:).*$", "", part)
        if not (
            part.startswith(("pmod ", "python -m pmod_cli "))
            or (part.startswith(LAUNCHERS) and "pmod_cli" in part)
        ):
            continue
        words = shlex.split(part)
        if "..." in words:  # a remark about another command
            continue
        for stop in (">", "2>", "|"):
            if stop in words:
                words = words[: words.index(stop)]
        name = "pmod" if words[0] == "pmod" else "pmod_cli"
        found.append(Command(where, part, words[words.index(name) + 1 :], block))
    return found
