"""Finds the results of ``pmod profile``, ``finetune``, ``eval`` and ``visualize`` in folders.

A result in JSON says which command wrote it, under ``command``. A picture of ``pmod visualize`` says so in its metadata
("Software"), a page in its head ("generator"). Checkpoints are known by their files' names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pmod_cli.output.errors import PmodError, first_line
from pmod_cli.output.files import read_json_lines

_DEPTH = 5
_LARGEST = 32 * 2**20
_CROWD = 200
"""A folder with more pictures than this holds data, not results."""

_PASSED_OVER = {"answers", "samples", "submissions", "images", "pictures"}
_VISUALIZE = "pmod visualize"


@dataclass(frozen=True)
class Profile:
    """One ``pmod profile --json``."""

    path: Path
    result: dict[str, Any]


@dataclass(frozen=True)
class Training:
    """One fine-tuning, finished (``training.json``) or under way.

    Attributes:
        path: The checkpoint, ``OUTPUT.training``, or a file with ``--json``.
        summary: ``training.json`` (of a ``--json`` only its ``result``); None while it runs.
        rows: Of ``metrics.jsonl``.
    """

    path: Path
    summary: dict[str, Any] | None
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class Evaluation:
    """One output folder of ``pmod eval`` (or its ``--json``: then without samples).

    Attributes:
        path: The folder, or the file.
        result: ``results.json``.
    """

    path: Path
    result: dict[str, Any]


@dataclass
class Found:
    """Everything that was found.

    Attributes:
        profiles: See `Profile`.
        trainings: See `Training`.
        evaluations: See `Evaluation`.
        conversions: The ``pmod`` section of a converted checkpoint's config, by the checkpoint.
        pictures: PNG sheets of ``pmod visualize``.
        pages: HTML pages of ``pmod visualize``.
        names: What models are called, by path, where a run says so.
        unread: What looked like a result and could not be read, with the reason.
    """

    profiles: list[Profile] = field(default_factory=list)
    trainings: list[Training] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    conversions: dict[Path, dict[str, Any]] = field(default_factory=dict)
    pictures: list[Path] = field(default_factory=list)
    pages: list[Path] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    unread: dict[Path, str] = field(default_factory=dict)

    @property
    def results(self) -> int:
        """How many outputs of the three commands."""
        return len(self.profiles) + len(self.trainings) + len(self.evaluations)


def collect(places: Sequence[Path]) -> Found:
    """Look through folders (five levels deep) and files.

    Args:
        places: Folders, or JSON files that a command's ``--json`` wrote.

    Raises:
        PmodError: A place does not exist, or holds nothing of the three commands.
    """
    found = Found()
    for place in places:
        if not place.exists():
            raise PmodError(f"no folder {place}")
        before = found.results
        if place.is_file():
            _read_result(place, found)
        else:
            for folder, files in _walk(place):
                _read_folder(folder, files, found)
        if found.results == before:
            broken = next((f"; {path} could not be read: {why}" for path, why in found.unread.items()), "")
            raise PmodError(
                f"{place} holds no output of pmod profile, finetune or eval{broken}",
                "give a checkpoint of finetune, an --output of eval, or a file with a command's --json",
            )
    _drop_repeated(found)
    return found


def _drop_repeated(found: Found) -> None:
    """Leave out what ``--json`` printed where the folder that the same run wrote was found too: it holds more."""
    trained = [run.summary["result"] for run in found.trainings if run.summary and run.path.is_dir()]
    found.trainings = [
        run for run in found.trainings if run.path.is_dir() or (run.summary or {})["result"] not in trained
    ]
    evaluated = [_run_of(evaluation) for evaluation in found.evaluations if evaluation.path.is_dir()]
    found.evaluations = [
        evaluation
        for evaluation in found.evaluations
        if evaluation.path.is_dir() or _run_of(evaluation) not in evaluated
    ]


def _run_of(evaluation: Evaluation) -> tuple[Any, Any]:
    """What tells one run of ``pmod eval`` from another: when it started, and the model."""
    return evaluation.result.get("started"), evaluation.result["model"]["source"]


def _walk(top: Path) -> Iterator[tuple[Path, list[str]]]:
    for folder, names, files in os.walk(top):
        here = Path(folder)
        deep = len(here.relative_to(top).parts) >= _DEPTH
        names[:] = [] if deep else sorted(filter(_worth_a_look, names))
        yield here, sorted(files)


def _worth_a_look(name: str) -> bool:
    # NAME_files holds the pictures of a report.
    return name not in _PASSED_OVER and not name.startswith(".") and not name.endswith("_files")


def _read_folder(folder: Path, files: list[str], found: Found) -> None:
    if "metrics.jsonl" in files or "training.json" in files:
        summary = _load(folder / "training.json", found) if "training.json" in files else None
        found.trainings.append(Training(folder, summary, read_json_lines(folder / "metrics.jsonl")))
    if "config.json" in files:
        config = _load(folder / "config.json", found) or {}
        if isinstance(config.get("mod"), dict):
            found.conversions[folder] = {"mod": config["mod"], **(config.get("pmod") or {})}
    if sum(name.endswith((".png", ".jpg", ".json")) for name in files) > _CROWD:
        return
    for path in (folder / name for name in files if name not in ("training.json", "config.json")):
        if path.suffix == ".json":
            _read_result(path, found)
        elif path.suffix == ".png" and _is_sheet(path):
            found.pictures.append(path)
        elif path.suffix == ".html" and _is_visualize_page(path):
            found.pages.append(path)


def _read_result(path: Path, found: Found) -> None:
    """Add what a command wrote: with its result under ``result`` (``--json``), or beside the tag."""
    document = _load(path, found)
    if document is None:
        return
    command, result = document.get("command"), document.get("result", document)
    if command == "profile":
        found.profiles.append(Profile(path, result))
    elif command == "eval" and "tasks" in result and "model" in result:  # --prepare and --diff have no scores
        found.evaluations.append(Evaluation(path.parent if path.name == "results.json" else path, result))
    elif command == "finetune":
        found.trainings.append(Training(path, {"result": result}, []))
    elif command == "demo":
        found.names |= result.get("models", {})
    elif command is None and path.name == "results.json":
        found.unread[path] = (
            "it does not say which command wrote it; run pmod eval again to bring it up to date"
        )


def _load(path: Path, found: Found) -> dict[str, Any] | None:
    """A JSON object; None if it is something else, too large for a result, or cannot be read."""
    try:
        if path.stat().st_size > _LARGEST:
            return None
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        found.unread[path] = first_line(error)
        return None
    return document if isinstance(document, dict) else None


def _is_sheet(path: Path) -> bool:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.info.get("Software") == _VISUALIZE
    except OSError:
        return False


def _is_visualize_page(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="replace") as file:
        return f'<meta name="generator" content="{_VISUALIZE}">' in file.read(1000)
