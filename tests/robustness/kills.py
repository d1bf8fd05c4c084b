"""Kills commands at random moments and looks at what they leave.

Each run is a forked child of this process, which has imported everything but computed nothing. A user's files lie
beside the output. After each kill they are as they were, and what stands at the output is whole. SIGTERM and Ctrl-C
leave nothing else and end in one line; after SIGKILL the same command, given again, ends well and clears up.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.robustness.good import EVAL, FINETUNE, in_child

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
USERS = {"photo.png": "a user's", "out.notes": "a user's"}
"""Files beside the output that no command has to do with."""


def pmod(good: Path, *words: object) -> Callable[[], None]:
    """A command line in the good folder, as an action."""

    def action() -> None:
        from pmod_cli.__main__ import main

        os.chdir(good)
        sys.argv = ["pmod", *map(str, words)]
        main()

    return action


COMMANDS: dict[str, list[object]] = {
    "convert": ["convert", "dense", "--recipe", "demo", "--copy"],
    "calibrate": ["calibrate", "pmod", "--data", "train/train.json", "--images", "train/images", "--samples", 24,
                  "--max-new-tokens", 1, "--output"],
    "finetune": [*FINETUNE, "--output"],
    "eval": [*EVAL, "--output"],
    "report": ["report", "tuned", "results", "-o"],
    "demo": ["demo", "--steps", 2, "--train-images", 8, "--heldout-images", 4, "--output"],
}  # fmt: skip
"""By name each command's words, without its output."""


def again(name: str, words: list[object], output: Path) -> list[object]:
    """The words with which the command goes on after a kill."""
    more: list[object] = ["--resume"] if name == "finetune" and not output.exists() else []
    if name in ("convert", "calibrate", "finetune", "report") and any(
        path.exists() for path in places(name, output)
    ):
        more = ["--force"]
    return [*words, output, *more]


def places(name: str, output: Path) -> list[Path]:
    """Where a command writes."""
    if name == "report":
        return [output, output.with_suffix(".md"), output.with_name("out_files")]
    return [output]


def wrongs(name: str, output: Path, number: int | None, code: int, text: str) -> Iterator[str]:
    """What should not be, after a signal or (None) after a run to the end."""
    from pmod_cli.output.marks import is_ours

    room = output.parent
    if {key: (room / key).read_text() for key in USERS} != USERS:
        yield "a file of the user's changed"
    if "Traceback" in text:
        yield f"a traceback: {text[-2000:]}"
    allowed = {*USERS, *(path.name for path in places(name, output))}
    if number is None or number == signal.SIGKILL:
        # The demo misses its targets with so few steps.
        if code not in ((0, 1) if name == "demo" else (0,)) and number is None:
            yield f"exit {code}"
    elif code not in (0, 128 + number, *([1] if name == "demo" else [])):
        yield f"exit {code}"
    elif code == 128 + number and text.count("error: ") > 1:
        yield "more than one line"
    if number == signal.SIGKILL:
        return
    if number is not None and name == "finetune" and list(room.glob("out.training/checkpoint-*")):
        allowed.add("out.training")
    if number is not None and name == "calibrate":
        allowed.add(".out.calibrating")
    if left := sorted({path.name for path in room.iterdir()} - allowed):
        yield f"left: {', '.join(left)}"
    if name != "demo" and (left := sorted(str(path) for path in output.rglob(".*.partial"))):
        yield f"left: {', '.join(left)}"
    there = [path for path in places(name, output) if path.exists()]
    if name == "report" and len(there) not in (0, 3):
        yield "a part of the report"
    if name in ("convert", "calibrate", "finetune") and there:
        mark = json.loads((output / ".pmod").read_text())
        if not is_ours(output) or not all((output / file).is_file() for file in mark["files"]):
            yield "a part of the checkpoint"


def kill(
    name: str, words: list[object], good: Path, folder: Path, kills: int, chance: random.Random
) -> list[str]:
    """Kill a command so many times; what was wrong, in words."""
    log, suffix = folder / "log", ".html" if name == "report" else ""

    def room_for(label: object) -> Path:
        room = folder / f"{name}-{label}"
        room.mkdir()
        for key, text in USERS.items():
            (room / key).write_text(text)
        return room / f"out{suffix}"

    output = room_for("whole")
    code, seconds = in_child(pmod(good, *words, output), log)
    found = [f"{name}, whole: {wrong}" for wrong in wrongs(name, output, None, code, log.read_text())]
    for turn in range(kills):
        number, output = SIGNALS[turn % len(SIGNALS)], room_for(turn)
        # Every other one near the end, where results are put in their places.
        moment = seconds * (chance.uniform(0.75, 1.0) if chance.random() < 0.5 else chance.random())
        code, _ = in_child(pmod(good, *words, output), log, (number, moment))
        told = f"{name}, {signal.Signals(number).name} after {moment:.2f} of {seconds:.2f} s"
        found += [f"{told}: {wrong}" for wrong in wrongs(name, output, number, code, log.read_text())]
        if number == signal.SIGKILL:
            code, _ = in_child(pmod(good, *again(name, words, output)), log)
            found += [
                f"{told}, again: {wrong}" for wrong in wrongs(name, output, None, code, log.read_text())
            ]
    return found


def kill_all(good: Path, commands: Sequence[str], kills: int, seed: int) -> list[str]:
    """Kill each command so many times, at moments that the seed decides; what was wrong, in words."""
    for number in (signal.SIGTERM, signal.SIGINT):  # as `pmod_cli.__main__` does
        signal.signal(number, lambda number, _: os._exit(128 + number))
    chance, wrong = random.Random(seed), []
    with tempfile.TemporaryDirectory() as folder:
        for command in commands:
            wrong += kill(command, COMMANDS[command], good, Path(folder), kills, chance)
    return wrong
