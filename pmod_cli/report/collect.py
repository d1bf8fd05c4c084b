"""Finds what ``pmod profile``, ``finetune``, ``eval`` and ``visualize`` left in folders, by what files contain."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pmod_cli.output.errors import PmodError

_DEPTH = 5
_LARGEST = 32 * 2**20
_CROWD = 200
"""A folder with more pictures than this holds data, not results."""

_PASSED_OVER = {"answers", "samples", "submissions", "images", "pictures"}
_NOT_RESULTS = {"tokenizer.json", "tokenizer_config.json", "processor_config.json", "generation_config.json"}


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

    def samples(self, task: str) -> list[dict[str, Any]]:
        """Documents with their answers and scores; empty if they were not kept."""
        file = self.path / "samples" / f"{task}.jsonl"
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
            return [json.loads(line) for line in lines if line]
        except (OSError, ValueError):
            return []


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
            _read_json(place, found)
        else:
            for folder, files in _walk(place):
                _read_folder(folder, files, found)
        if found.results == before:
            broken = next(iter(found.unread.items()), None)
            raise PmodError(
                f"{place} holds no output of pmod profile, finetune or eval"
                + (f"; {broken[0]} could not be read: {broken[1]}" if broken else ""),
                "give a checkpoint of finetune, an --output of eval, or a file with a command's --json",
            )
    _drop_repeated(found)
    return found


def _drop_repeated(found: Found) -> None:
    """What ``finetune --json`` printed is told better by the checkpoint itself, where that was found too."""
    told = [
        training.summary["result"]
        for training in found.trainings
        if training.summary and training.path.is_dir()
    ]
    found.trainings = [
        training
        for training in found.trainings
        if training.path.is_dir() or (training.summary or {})["result"] not in told
    ]


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
        found.trainings.append(Training(folder, summary, _rows(folder / "metrics.jsonl")))
    if "config.json" in files:
        config = _load(folder / "config.json", found) or {}
        if isinstance(config.get("mod"), dict):
            found.conversions[folder] = {"mod": config["mod"], **(config.get("pmod") or {})}
    crowded = sum(name.endswith((".png", ".jpg", ".json")) for name in files) > _CROWD
    for name in files:
        path = folder / name
        if crowded or name in _NOT_RESULTS or name in ("training.json", "config.json"):
            continue
        if name.endswith(".json"):
            _read_json(path, found)
        elif name.endswith(".png") and _is_sheet(path):
            found.pictures.append(path)
        elif name.endswith(".html") and _is_visualize_page(path):
            found.pages.append(path)


def _read_json(path: Path, found: Found) -> None:
    document = _load(path, found)
    if document is None:
        return
    # Bare (results.json), within a command's --json, or within a step of the demo.
    result = document.get("result") if isinstance(document.get("result"), dict) else document
    assert result is not None
    if {"workload", "ratios", "convention"} <= result.keys():
        found.profiles.append(Profile(path, result))
    elif {"tasks", "environment", "settings", "model"} <= result.keys():
        if path.name == "results.json":
            found.evaluations.append(Evaluation(path.parent, result))
        elif path.parent.name != "steps":  # the demo's step repeats what stands in the evaluation's folder
            found.evaluations.append(Evaluation(path, result))
    elif {"output", "steps", "parts", "final_loss"} <= result.keys():
        found.trainings.append(Training(path, {"result": result}, []))
    elif {"rows", "models", "targets"} <= result.keys():
        found.names |= result["models"]


def _load(path: Path, found: Found) -> dict[str, Any] | None:
    try:
        if path.stat().st_size > _LARGEST:
            return None
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        found.unread[path] = str(error).splitlines()[0]
        return None
    return document if isinstance(document, dict) else None


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break  # the line that was being written
    return rows


def _is_sheet(path: Path) -> bool:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return bool(image.info.get("Software") == "pmod visualize")
    except OSError:
        return False


def _is_visualize_page(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8") as file:
            return "<title>p-MoD: where the vision tokens go</title>" in file.read(1000)
    except (OSError, ValueError):
        return False
