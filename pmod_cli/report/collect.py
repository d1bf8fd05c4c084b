"""Finds the results of ``pmod profile``, ``finetune``, ``eval`` and ``visualize`` in folders.

A result in JSON says which command wrote it, under ``command``. A picture of ``pmod visualize`` says so in its metadata
("Software"), a page in its head ("generator"). Checkpoints are known by their files' names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from pmod_cli.modeling.settings import MoDConfig
from pmod_cli.output.errors import PmodError, first_line
from pmod_cli.output.paths import is_inside
from pmod_cli.output.reading import check_regular, read_json_lines, read_text

_DEPTH = 5
_LARGEST = 32 * 2**20
_CROWD = 200
"""A folder with more pictures than this holds data, not results."""

_PASSED_OVER = {"answers", "samples", "submissions", "images", "pictures"}
_VISUALIZE = "pmod visualize"
_NEEDED = {
    "profile": ("ratios", "workload.batch"),
    "eval": ("tasks", "model.source"),
    "finetune": ("output", "steps", "samples", "seconds", "parts"),
}
FROM = "read from"
"""The key under which a profile has its own file."""

_TRAINING = ("recipe.name", "model", "processes", *(f"result.{key}" for key in _NEEDED["finetune"]))
"""Keys without which a command's result says nothing to a report."""


@dataclass(frozen=True)
class Training:
    """One fine-tuning: its checkpoint, ``OUTPUT.training`` or file with ``--json``.

    Attributes:
        summary: ``training.json`` (of a ``--json`` only its ``result``); empty while it runs.
        rows: Of ``metrics.jsonl``.
    """

    path: Path
    summary: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluation:
    """``results.json`` in an output folder of ``pmod eval``, or the file of its ``--json``: then without samples."""

    path: Path
    result: dict[str, Any]

    @property
    def started(self) -> tuple[Any, Any]:
        """When and of which model: tells one run from another."""
        return self.result.get("started"), self.result["model"]["source"]


@dataclass
class Found:
    """Everything that was found.

    Attributes:
        profiles: Results of ``pmod profile --json``.
        conversions: The ``pmod`` section of a converted checkpoint's config, by the checkpoint.
        pictures: PNG sheets of ``pmod visualize``.
        pages: HTML pages of ``pmod visualize``.
        names: What models are called, by path, where a run says so.
        unread: What looked like a result and could not be read, with the reason.
    """

    profiles: list[dict[str, Any]] = field(default_factory=list)
    trainings: list[Training] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    conversions: dict[Path, dict[str, Any]] = field(default_factory=dict)
    pictures: list[Path] = field(default_factory=list)
    pages: list[Path] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    unread: dict[Path, str] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """How many outputs of the three commands."""
        return {name: len(getattr(self, name)) for name in ("profiles", "trainings", "evaluations")}

    def without_broken(self, use: Callable[[Found], object]) -> Found:
        """What is left without the items that cannot be used, each tried alone; they are listed as unread."""
        kept = Found(unread=dict(self.unread))
        for name, path_of in _PATHS.items():
            items = getattr(self, name)
            for key in list(items):
                alone: Any = {key: items[key]} if isinstance(items, dict) else [key]
                try:
                    use(Found(**{name: alone}))
                except Exception as error:
                    kept.unread[path_of(key)] = f"not what pmod wrote: {first_line(error)}"
                else:
                    more = getattr(kept, name)
                    more.update(alone) if isinstance(items, dict) else more.extend(alone)
        return kept


_PATHS: dict[str, Callable[[Any], Path]] = {
    "profiles": lambda profile: profile[FROM],
    "trainings": lambda training: training.path,
    "evaluations": lambda evaluation: evaluation.path,
    "conversions": Path,
    "pictures": Path,
    "pages": Path,
    "names": Path,
}
"""Which file each item of `Found` is of."""


def collect(paths: Sequence[Path]) -> Found:
    """Look through folders (five levels deep) and JSON files that a command's ``--json`` wrote.

    Raises:
        PmodError: A place does not exist, or holds nothing of the three commands.
    """
    found = Found()
    for path in paths:
        if not path.exists():
            raise PmodError(f"no folder {path}")
        before = found.counts
        if path.is_file():
            with _unread(path, found):
                _read_result(path, found)
        for folder, names, files in os.walk(path):
            here = Path(folder)
            # NAME_files holds the pictures of a report.
            names[:] = sorted(
                name for name in names if not name.startswith(".") and not name.endswith("_files")
            )
            names[:] = [name for name in names if name not in _PASSED_OVER]
            if len(here.relative_to(path).parts) >= _DEPTH:
                names.clear()
            outside = {here / name for name in files if not is_inside(here / name, path)}
            found.unread |= dict.fromkeys(sorted(outside), "a link out of the folder")
            _read_folder(here, sorted(name for name in files if here / name not in outside), found)
        if found.counts == before:
            broken = next((f"; {path} could not be read: {why}" for path, why in found.unread.items()), "")
            raise PmodError(
                f"{path} holds no output of pmod profile, finetune or eval{broken}",
                "give a checkpoint of finetune, an --output of eval, or a file with a command's --json",
            )

    # What --json printed is left out where the folder that the same run wrote was found too: it holds more.
    def told(run: Training) -> Any:
        result = run.summary.get("result")
        return result and {key: value for key, value in result.items() if key != "output"}

    trained = [told(run) for run in found.trainings if run.path.is_dir()]
    found.trainings = [run for run in found.trainings if run.path.is_dir() or told(run) not in trained]
    evaluated = [run.started for run in found.evaluations if run.path.is_dir()]
    found.evaluations = [
        run for run in found.evaluations if run.path.is_dir() or run.started not in evaluated
    ]
    return found


def _read_folder(folder: Path, files: list[str], found: Found) -> None:
    if "metrics.jsonl" in files or "training.json" in files:
        with _unread(folder / "metrics.jsonl", found):
            _read_training(folder, files, found)
    if "config.json" in files:
        with _unread(folder / "config.json", found):
            _read_conversion(folder, found)
    if sum(name.endswith((".png", ".jpg", ".json")) for name in files) > _CROWD:
        return
    for path in (folder / name for name in files if name not in ("training.json", "config.json")):
        with _unread(path, found):
            _read_file(path, found)


@contextmanager
def _unread(path: Path, found: Found) -> Iterator[None]:
    """List a file that cannot be used, for whatever reason, and go on."""
    try:
        yield
    except Exception as error:
        known = isinstance(error, OSError | ValueError | PmodError)
        found.unread[path] = first_line(error) if known else f"not what pmod wrote: {type(error).__name__}"


def _read_training(folder: Path, files: list[str], found: Found) -> None:
    summary = _load(folder / "training.json", found) if "training.json" in files else None
    if summary is not None and not _holds(summary, _TRAINING):
        found.unread[folder / "training.json"] = "it is not what pmod finetune writes"
        summary = None
    rows = [row for row in read_json_lines(folder / "metrics.jsonl") if isinstance(row, dict)]
    found.trainings.append(Training(folder, summary or {}, rows))


def _read_conversion(folder: Path, found: Found) -> None:
    config = _load(folder / "config.json", found) or {}
    if isinstance(config.get("mod"), dict) and isinstance(config.get("pmod") or {}, dict):
        MoDConfig.from_dict(config["mod"])
        found.conversions[folder] = {"mod": config["mod"], **(config.get("pmod") or {})}


def _read_file(path: Path, found: Found) -> None:
    if not path.is_file() or path.suffix not in (".json", ".png", ".html"):  # a pipe would wait
        return
    check_regular(path, 4 * _LARGEST)
    if path.suffix == ".json":
        _read_result(path, found)
    elif path.suffix == ".png":
        with Image.open(path) as image:
            found.pictures += [path] if image.info.get("Software") == _VISUALIZE else []
    elif path.suffix == ".html":
        with path.open(encoding="utf-8", errors="replace") as file:
            if f'<meta name="generator" content="{_VISUALIZE}">' in file.read(1000):
                found.pages.append(path)


def _read_result(path: Path, found: Found) -> None:
    """Add what a command wrote: with its result under ``result`` (``--json``), or beside the tag."""
    document = _load(path, found)
    if document is None:
        return
    command, result = document.get("command"), document.get("result", document)
    if command in _NEEDED and not _holds(result, _NEEDED[command]):
        # --prepare, --diff, --sweep and --compare have no figures to show; a file that lost its keys has neither.
        if command != "eval" or path.name == "results.json":
            found.unread[path] = f"it is not what pmod {command} writes for a report"
        return
    if command == "profile":
        found.profiles.append(result | {FROM: path})
    elif command == "eval":
        found.evaluations.append(Evaluation(path.parent if path.name == "results.json" else path, result))
    elif command == "finetune":
        found.trainings.append(Training(path, {"result": result}))
    elif command == "demo":
        found.names |= result.get("models", {})
    elif command is None and path.name == "results.json":
        found.unread[path] = (
            "it does not say which command wrote it; run pmod eval again to bring it up to date"
        )


def _holds(result: Any, keys: Sequence[str]) -> bool:
    """Whether there is something under each of the dotted keys."""
    for key in keys:
        inner = result
        for part in key.split("."):
            inner = inner.get(part) if isinstance(inner, dict) else None
        if inner is None:
            return False
    return True


def _load(path: Path, found: Found) -> dict[str, Any] | None:
    """A JSON object; None if it is something else, too large for a result, or cannot be read."""
    try:
        if path.stat().st_size > _LARGEST:
            return None
        document = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError, PmodError) as error:
        found.unread[path] = first_line(error)
        return None
    return document if isinstance(document, dict) else None
