"""The tasks that lmms-eval knows, and those of the user's own folders."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pmod_cli.evaluation import patches
from pmod_cli.evaluation.blame import told
from pmod_cli.extras import reason, require
from pmod_cli.output.errors import PmodError
from pmod_cli.output.paths import real_path
from pmod_cli.output.reading import check_regular

_BUILDERS = ("csv", "json", "parquet", "text", "pandas", "arrow", "imagefolder", "webdataset")
"""Data set paths that name a kind of file."""
_MOST_REPEATS = 1000
_KINDS: dict[str, tuple[type, str]] = {
    **dict.fromkeys(("metric_list", "filter_list"), (list, "a list")),
    **dict.fromkeys(("dataset_name", "training_split", "validation_split", "test_split"), (str, "text")),
    **dict.fromkeys(
        ("dataset_kwargs", "generation_kwargs", "lmms_eval_specific_kwargs"), (dict, "a mapping")
    ),
}
"""What a task's values are, where they are given."""


def import_lmms_eval() -> None:
    """Import all of lmms-eval that an evaluation uses, with its log on stderr; see `require` for the errors."""
    require("datasets")  # first, because lmms-eval would only say that it lacks it
    require("lmms_eval")
    patches.quiet()


class Tasks:
    """The tasks that lmms-eval knows, those of the user's own folders first.

    A task in a folder of the user's replaces lmms-eval's of the same name. A folder that is missing, or has YAML that
    cannot be read, is a `PmodError`.
    """

    def __init__(
        self,
        names: Sequence[str],
        include_path: str | Path | Sequence[str | Path] | None = None,
        task_name: str = "pmod",
    ) -> None:
        import_lmms_eval()
        from lmms_eval import tasks as builtin

        paths = [include_path] if isinstance(include_path, (str, Path)) else include_path or ()
        self.folders = [str(real_path(path)) for path in paths]
        for folder in self.folders:
            if not Path(folder).is_dir():
                raise PmodError(f"--include-path {folder}: no such folder")
            for path in Path(folder).rglob("*.yaml"):
                check_regular(path, 2**24)
        self.task_name = task_name
        self.manager = self._index(self.folders)
        if not all(name in self.manager.task_index for name in names):
            # The first folder that has a name wins. lmms-eval's two thousand tasks take seconds to read.
            self.manager = self._index([*self.folders, str(Path(builtin.__file__).parent)])

    def _index(self, folders: Sequence[str]) -> Any:
        from lmms_eval.tasks import TaskManager

        class Manager(TaskManager):
            """Reads paths in a task file relative to it, as lmms-eval does for ``data_files`` alone."""

            def _get_config(self, name: str) -> dict[str, Any]:
                config: dict[str, Any] = super()._get_config(name)
                return _located(config, self.task_index[name]["yaml_path"])

        try:
            return Manager(include_path=list(folders), include_defaults=False, model_name=self.task_name)
        except Exception as error:  # a YAML error, a missing include, a document that is no mapping ...
            what = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise PmodError(f"a task file below {', '.join(folders)} cannot be read: {what}") from error

    def leaves(self, name: str) -> list[str]:
        """The tasks that a name stands for: itself, or the members of a group or tag; a `PmodError` if unknown."""
        if name not in self.manager.task_index:
            near = difflib.get_close_matches(name, self.manager.all_tasks, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else None
            raise PmodError(f"lmms-eval has no task {name!r}", hint)
        entry = self.manager.task_index[name]
        if entry["type"] in ("task", "python_task"):
            return [name]
        members = self.config(name)["task"] if entry["task"] == -1 else entry["task"]
        if not members:
            raise PmodError(f"{name} is a group without tasks", f"see {self.file(name)}")
        if not all(isinstance(member, str) for member in members):
            raise PmodError(f"{name} is a group that changes its tasks' settings", "name its tasks instead")
        return [leaf for member in members for leaf in self.leaves(member)]

    def config(self, name: str) -> dict[str, Any]:
        """A task's YAML, includes resolved; a `PmodError` if it, or code that it names, cannot be loaded."""
        try:
            config = self.manager._get_config(name)
            _check_shapes(config)
            return config
        except (Exception, SystemExit) as error:
            # Some tasks make their judge's client, or read a variable, as soon as they are imported.
            variable = "OPENAI_API_KEY" if type(error).__name__ == "OpenAIError" else str(error).strip("'")
            known = re.fullmatch("[A-Z]+_[A-Z_]+", variable)
            hint = f"export {variable}=..." if known else f"see {self.file(name)}"
            raise PmodError(f"task {name} cannot be loaded: {told(error)}", hint) from error

    def load(self, name: str) -> Any:
        """Load a task with its data; a `PmodError` if they cannot be had."""
        from lmms_eval.tasks import get_task_dict
        from tenacity import RetryError

        try:
            task = get_task_dict([name], self.manager, "simple")[name]
            len(task.eval_docs)  # is its split there?
            return task
        except RetryError as error:
            cause: BaseException = error.last_attempt.exception() or error
            raise PmodError(f"the data of task {name} cannot be had: {reason(cause)}") from cause
        except (Exception, SystemExit) as error:
            config = self.config(name)
            splits = [key for key in config if key.endswith("_split") and [config[key]] == [*error.args]]
            if isinstance(error, KeyError) and splits:
                what = f"task {name}: its data ({config['dataset_path']}) have no split {error}"
                raise PmodError(what, f"correct {splits[0]} in {self.file(name)}") from error
            raise PmodError(
                f"task {name} cannot be loaded: {told(error)}", f"see {self.file(name)}"
            ) from error

    def missing_folder(self, name: str, config: dict[str, Any]) -> str | None:
        """The local folder that a task of the user's names and that is not there.

        `datasets` would take what it once made of any folder of that name.
        """
        path, file = str(config.get("dataset_path")), Path(self.file(name))
        own = any(file.is_relative_to(folder) for folder in self.folders)
        local = path.startswith(".") or ("/" not in path and path not in _BUILDERS)
        return str(file.parent / path) if own and local and config.get("dataset_path") else None

    def file(self, name: str) -> str:
        """The YAML file of a task."""
        entry = self.manager.task_index.get(name, {})
        return str(entry.get("yaml_path", f"the file of task {name}"))


def _check_shapes(config: dict[str, Any]) -> None:
    """Refuse values of another kind than what reads them takes them for."""
    for key, (kind, what) in _KINDS.items():
        if config.get(key) is not None and not isinstance(config[key], kind):
            raise ValueError(f"{key} is {config[key]!r:.40}, not {what}")
    metrics, repeats = config.get("metric_list") or [], config.get("repeats", 1)
    if not all(isinstance(metric, dict) for metric in metrics):
        raise ValueError("metric_list is no list of mappings")
    if not isinstance(repeats, int) or not 1 <= repeats <= _MOST_REPEATS:
        raise ValueError(f"repeats is {repeats!r}, not a number from 1 to {_MOST_REPEATS}")


def _located(config: dict[str, Any], file: str | int) -> dict[str, Any]:
    """A task's YAML with its local data found from the file's folder, where they are there."""
    path = config.get("dataset_path")
    if isinstance(path, str) and isinstance(file, str) and (found := Path(file).parent / path).exists():
        return config | {"dataset_path": str(found.resolve())}
    return config
