"""What is missing for an evaluation, found before any model is loaded and all at once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmod_cli.errors import PmodError
from pmod_cli.evaluation.harness import Tasks

FURTHER_DATA = {"gqa": [("lmms-lab-encoder/GQA", "testdev_balanced_images")]}
"""Data sets that a task's own code loads besides the one in its YAML (unless its ``process_docs`` is replaced)."""

JUDGES = {"mmbench_en_dev": ("OPENAI_API_KEY", "mmbench_en_dev_static")}
"""Tasks with a paid judge: where its key is, and the task that does without."""


@dataclass(frozen=True)
class Problem:
    """Something missing.

    Attributes:
        task: For which task.
        what: What is missing.
        remedy: The command that gets it.
    """

    task: str
    what: str
    remedy: str


class PreflightError(PmodError):
    """Something is missing; ``problems`` says all that is."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        first = problems[0]
        more = f"; {len(problems) - 1} more like it" if len(problems) > 1 else ""
        super().__init__(f"{first.task}: {first.what}{more}", first.remedy)


def check(catalogue: Tasks, leaves: Iterable[str], *, offline: bool = False, preparing: bool = False) -> None:
    """Make sure that everything the tasks need is there or can be had.

    Args:
        catalogue: The tasks.
        leaves: Those to check.
        offline: Do not ask the network.
        preparing: The data are about to be downloaded, so judges don't matter yet.

    Raises:
        PreflightError: If anything is missing.
    """
    hub = _Hub(offline)
    problems = []
    for leaf in leaves:
        config = catalogue.config(leaf)
        output_type = config.get("output_type", "generate_until")
        if output_type != "generate_until":
            problems.append(
                Problem(leaf, f"is of type {output_type}; pmod answers generate_until tasks", "leave it out")
            )
        if leaf in JUDGES and not preparing:
            variable, instead = JUDGES[leaf]
            if not os.environ.get(variable):
                problems.append(
                    Problem(
                        leaf, "asks a paid judge, and has no key", f"export {variable}=... or use {instead}"
                    )
                )
        for path, name in _data_sets(leaf, config):
            problem = hub.problem(leaf, config, path, name)
            if problem:
                problems.append(problem)
                break
    problems += hub.disk_problems()
    if problems:
        raise PreflightError(problems)


def _data_sets(leaf: str, config: dict[str, Any]) -> Iterator[tuple[str, str | None]]:
    yield config["dataset_path"], config.get("dataset_name")
    if config.get("process_docs") is not None:
        yield from FURTHER_DATA.get(leaf, [])


class _Hub:
    """The hub as far as it can be seen from here; asked once a data set, and no more once it is out of reach."""

    def __init__(self, offline: bool) -> None:
        import huggingface_hub

        self.offline = offline or huggingface_hub.constants.HF_HUB_OFFLINE
        self.token = huggingface_hub.get_token()
        self.reachable = True
        self.sizes: dict[str, int] = {}
        self.answers: dict[str, tuple[str, str] | None] = {}

    def problem(self, leaf: str, config: dict[str, Any], path: str, name: str | None) -> Problem | None:
        options = config.get("dataset_kwargs") or {}
        if missing := _missing_files(path, options):
            return Problem(leaf, f"has no data at {missing}", "check the task's dataset_path and data_files")
        if "data_files" in options or Path(path).exists() or cached(path, name):
            return None
        if self.offline:
            return Problem(
                leaf,
                f"its data ({path}) are not on this machine, and the network may not be asked",
                f"pmod eval --prepare --tasks {leaf}",
            )
        if options.get("token") and not self.token:
            return Problem(leaf, f"its data ({path}) need a hub login", "hf auth login")
        if path not in self.answers:
            self.answers[path] = self._ask(path)
        answer = self.answers[path]
        return Problem(leaf, *answer) if answer else None

    def _ask(self, path: str) -> tuple[str, str] | None:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

        unreachable = (
            "the hub cannot be reached",
            "on a machine that can: pmod eval --prepare, then copy HF_HOME",
        )
        if not self.reachable:
            return unreachable
        try:
            info = HfApi().dataset_info(path, files_metadata=True, timeout=10)
        except GatedRepoError:
            return (
                f"access to its data ({path}) has to be asked for",
                f"https://huggingface.co/datasets/{path}",
            )
        except RepositoryNotFoundError:
            return f"its data ({path}) are not on the hub, or need a login", "hf auth login"
        except HfHubHTTPError as error:
            return f"the hub refuses its data ({path}): {error}", "try again later"
        except Exception:  # whatever the HTTP library of the day raises without a network
            self.reachable = False
            return unreachable
        self.sizes[path] = sum(file.size or 0 for file in info.siblings or [])
        return None

    def disk_problems(self) -> list[Problem]:
        """Too little room for what would be downloaded: at most the data sets' whole repositories."""
        needed = sum(self.sizes.values())
        place = _cache_folder()
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        if needed <= free:
            return []
        gigabytes = f"up to {needed / 1e9:.1f} GB to download, {free / 1e9:.1f} GB free on {place}"
        return [Problem("all", gigabytes, "export HF_HOME=/a/larger/disk")]


def cached(path: str, name: str | None) -> bool:
    """Whether ``datasets`` has its copy of a hub data set's configuration."""
    folder = _cache_folder() / path.replace("/", "___")
    return any(folder.glob(f"{name or '*'}/*/*/dataset_info.json"))


def _cache_folder() -> Path:
    import datasets

    own = os.environ.get("LMMS_EVAL_DATASETS_CACHE", "").strip()
    return Path(os.path.expandvars(own)).expanduser() if own else Path(datasets.config.HF_DATASETS_CACHE)


def _missing_files(path: str, options: dict[str, Any]) -> str | None:
    """The first local file or folder that a task names and that is not there."""
    if Path(path).is_absolute() and not Path(path).exists():
        return path
    files = options.get("data_files") or []
    named = files.values() if isinstance(files, dict) else [files]
    for entry in named:
        for file in [entry] if isinstance(entry, str) else entry:
            if "://" not in file and "*" not in file and not Path(file).exists():
                return file
    return None
