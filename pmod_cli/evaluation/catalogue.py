"""The tasks that lmms-eval knows, and those of the user's own folders."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pmod_cli.evaluation import patches
from pmod_cli.extras import reason, require
from pmod_cli.output.errors import PmodError


def import_lmms_eval() -> None:
    """Import all of lmms-eval that an evaluation uses, with its log on stderr.

    Raises:
        MissingExtraError: If it, or `datasets`, is not installed.
        BrokenPackageError: If one is installed and cannot be imported.
    """
    require("datasets")  # first, because lmms-eval would only say that it lacks it
    require("lmms_eval")
    patches.quiet()


class UnknownTaskError(PmodError):
    """No task, group or tag of that name; ``hint`` has the nearest names."""


class Tasks:
    """The tasks that lmms-eval knows, those of the user's own folders first.

    Args:
        names: The tasks that are wanted. lmms-eval's index of its two thousand takes seconds to read; where it can
            be told which of its folders hold the wanted ones, only those are read.
        include_paths: Folders with task YAML files. A task of theirs replaces lmms-eval's of the same name.

    Raises:
        PmodError: A folder is missing, or has YAML that cannot be read.
    """

    def __init__(self, names: Sequence[str], include_paths: Sequence[str | Path] = ()) -> None:
        import_lmms_eval()
        from lmms_eval import tasks as builtin

        self.folders = [str(Path(path).expanduser().resolve()) for path in include_paths]
        for folder in self.folders:
            if not Path(folder).is_dir():
                raise PmodError(f"--include-path {folder}: no such folder")
        root = Path(builtin.__file__).parent
        self.manager: Any = self._index(self.folders)
        missing = [name for name in names if not self._covers([name])]
        # The first folder that has a name wins, so lmms-eval's own come last.
        if missing:
            self.manager = self._index([*self.folders, *folders_of(missing, root)])
        if not self._covers(names):
            self.manager = self._index([*self.folders, str(root)])

    @staticmethod
    def _index(folders: Sequence[str]) -> Any:
        from lmms_eval.tasks import TaskManager

        try:
            return TaskManager(include_path=list(folders), include_defaults=False, model_name="pmod")
        except Exception as error:  # a YAML error, a missing include, a document that is no mapping ...
            raise PmodError(
                f"a task file below {', '.join(folders)} cannot be read: {' '.join(str(error).split())}"
            ) from error

    def leaves(self, name: str) -> list[str]:
        """The tasks that a name stands for: itself, or the members of a group or tag.

        Raises:
            UnknownTaskError: Unknown name.
            PmodError: A group of a kind that is not supported.
        """
        kind = self._kind(name)
        if kind is None:
            near = difflib.get_close_matches(name, self.manager.all_tasks, n=3, cutoff=0.5)
            raise UnknownTaskError(
                f"lmms-eval has no task {name!r}", f"did you mean {' or '.join(near)}?" if near else None
            )
        if kind in ("task", "python_task"):
            return [name]
        members = self.manager.task_index[name]["task"]
        if members == -1:
            members = self.config(name)["task"]
        if not all(isinstance(member, str) for member in members):
            raise PmodError(f"{name} is a group that changes its tasks' settings", "name its tasks instead")
        return [leaf for member in members for leaf in self.leaves(member)]

    def config(self, name: str) -> dict[str, Any]:
        """A task's YAML, includes resolved.

        Raises:
            PmodError: The YAML, or code that it names, cannot be loaded.
        """
        try:
            return self.manager._get_config(name)
        except Exception as error:
            raise PmodError(f"task {name} cannot be loaded: {reason(error)}") from error

    def load(self, name: str) -> Any:
        """Load a task with its data.

        Raises:
            PmodError: If the data cannot be had.
        """
        from lmms_eval.tasks import get_task_dict
        from tenacity import RetryError

        try:
            return get_task_dict([name], self.manager, "simple")[name]
        except RetryError as error:
            cause: BaseException = error.last_attempt.exception() or error
            raise PmodError(f"the data of task {name} cannot be had: {reason(cause)}") from cause
        except Exception as error:
            raise PmodError(f"task {name} cannot be loaded: {reason(error)}") from error

    def _covers(self, names: Sequence[str]) -> bool:
        try:
            return all(self.leaves(name) for name in names)
        except PmodError:
            return False

    def _kind(self, name: str) -> str | None:
        return self.manager.task_index[name]["type"] if name in self.manager.task_index else None


def folders_of(names: Sequence[str], root: Path) -> list[str]:
    """The folders below ``root`` whose YAML files define names, found by their text alone.

    Names that are not found so, or in more than one place, are left out.
    """
    wanted = "|".join(re.escape(name) for name in names)
    definition = re.compile(rf"^(?:task|group)\s*:\s*[\"']?({wanted})[\"']?\s*$", re.MULTILINE)
    found: dict[str, set[Path]] = {}
    for path in root.rglob("*.yaml"):
        for name in definition.findall(path.read_text(encoding="utf-8", errors="replace")):
            found.setdefault(name, set()).add(path)
    # In the order of the names, each folder once.
    single = [next(iter(found[name])).parent for name in names if len(found.get(name, ())) == 1]
    return list(dict.fromkeys(str(folder) for folder in single))
