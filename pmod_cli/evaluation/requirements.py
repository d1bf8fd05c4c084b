"""What is missing for an evaluation, found before any model is loaded and all at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pmod_cli.checkpoints.load import check_source
from pmod_cli.checkpoints.write import free_space
from pmod_cli.evaluation.catalogue import Tasks
from pmod_cli.evaluation.judges import missing_key
from pmod_cli.evaluation.metrics import METRICS
from pmod_cli.output.errors import PmodError, told_as

FURTHER_DATA = {"gqa": ("lmms-lab-encoder/GQA", "testdev_balanced_images")}
"""Data set that a task's own code loads besides the one in its YAML (unless its ``process_docs`` is replaced)."""

_PREPARE = "pmod eval --prepare --tasks"


class Problem(NamedTuple):
    """What is missing, for which task (or ``model``; ``all`` for the disk), and the command that gets it."""

    task: str
    what: str
    remedy: str


class PreflightError(PmodError):
    """Something is missing; ``problems`` says all that is."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        first = problems[0]
        more = f"; {len(problems) - 1} more like it" if len(problems) > 1 else ""
        absent = dict.fromkeys(each.task for each in problems if each.remedy.startswith(_PREPARE))
        remedy = f"{_PREPARE} {','.join(absent)}" if first.task in absent else first.remedy
        super().__init__(f"{first.task}: {first.what}{more}", remedy)


def check(
    catalogue: Tasks,
    names: Iterable[str],
    *,
    checkpoints: Iterable[str | Path] = (),
    offline: bool = False,
    preparing: bool = False,
) -> dict[str, list[str]]:
    """Make sure that everything the tasks need is there or can be had.

    Args:
        catalogue: Where the tasks come from.
        names: Tasks, groups and tags.
        checkpoints: Folders and hub ids that will be evaluated.
        offline: Do not ask the network.
        preparing: The data are about to be downloaded, so judges don't matter yet.

    Returns:
        The tasks behind each name.

    Raises:
        PreflightError: Anything is missing.
    """
    hub = _Hub(offline, preparing)
    problems = [problem for source in checkpoints for problem in hub.checkpoint_problems(source)]
    leaves: dict[str, list[str]] = {}
    for name in names:
        try:
            leaves[name] = catalogue.leaves(name)
            for leaf in leaves[name]:
                config = catalogue.config(leaf)
                if missing := catalogue.missing_folder(leaf, config):
                    problems.append(
                        Problem(leaf, f"has no data at {missing}", f"correct {catalogue.file(leaf)}")
                    )
                else:
                    problems += _task_problems(leaf, config, hub)
        except PmodError as error:
            problems.append(Problem(name, error.message, error.hint or "mend the task, or leave it out"))
    problems += hub.disk_problems()
    if problems:
        raise PreflightError(list(dict.fromkeys(problems)))
    return leaves


def _task_problems(leaf: str, config: dict[str, Any], hub: _Hub) -> Iterator[Problem]:
    output_type = config.get("output_type", "generate_until")
    if output_type != "generate_until":
        yield Problem(leaf, f"is of type {output_type}; pmod answers generate_until tasks", "leave it out")
    if not hub.preparing and not _scored_by_rule(leaf) and (variable := missing_key(config)):
        instead = " or take mmbench_en_dev_static, which needs none" if leaf == "mmbench_en_dev" else ""
        yield Problem(leaf, "asks a paid judge, and has no key", f"export {variable}=...{instead}")
    data_sets = [(config.get("dataset_path"), config.get("dataset_name"))]
    if config.get("process_docs") is not None and leaf in FURTHER_DATA:
        data_sets.append(FURTHER_DATA[leaf])
    for path, name in data_sets:
        if path:
            yield from hub.data_problems(leaf, config, path, name)


def _scored_by_rule(leaf: str) -> bool:
    return leaf in METRICS and METRICS[leaf].units is not None


@contextlib.contextmanager
def offline_mode(wanted: bool) -> Iterator[None]:
    """Within it, and if wanted, the hub's clients refuse to ask the network."""
    import datasets
    import huggingface_hub

    switches = (
        (huggingface_hub.constants, "HF_HUB_OFFLINE"),
        (datasets.config, "HF_HUB_OFFLINE"),
        (datasets.config, "HF_DATASETS_OFFLINE"),
    )
    before = [getattr(module, name) for module, name in switches]
    try:
        for module, name in switches if wanted else ():
            setattr(module, name, True)
        yield
    finally:
        for (module, name), value in zip(switches, before, strict=True):
            setattr(module, name, value)


class _Hub:
    """The hub as far as it can be seen from here; asked once per data set, and no more once it is out of reach."""

    def __init__(self, offline: bool, preparing: bool) -> None:
        import huggingface_hub

        self.preparing = preparing
        self.offline = offline or huggingface_hub.constants.HF_HUB_OFFLINE
        self.token = huggingface_hub.get_token()
        self.reachable = True
        self.sizes: dict[str, int] = {}
        self.answers: dict[str, tuple[str, str] | None] = {}

    def data_problems(
        self, leaf: str, config: dict[str, Any], path: str, name: str | None
    ) -> Iterator[Problem]:
        """What is wrong with a data set of a task."""
        options = config.get("dataset_kwargs") or {}
        if missing := _missing_files(path, options):
            yield Problem(leaf, f"has no data at {missing}", "check the task's dataset_path and data_files")
        elif "data_files" in options or Path(path).exists() or cached(path, name):
            return
        elif not self.offline and options.get("token") and not self.token:
            yield Problem(leaf, f"its data ({path}) need a hub login", "hf auth login")
        else:
            remedy = "unset HF_HUB_OFFLINE" if self.preparing else f"{_PREPARE} {leaf}"
            yield from self._remote_problems(leaf, path, "dataset", remedy)

    def checkpoint_problems(self, source: str | Path) -> Iterator[Problem]:
        """What is wrong with a folder or hub id, as far as can be told without loading it."""
        from huggingface_hub import try_to_load_from_cache

        try:
            check_source(source)
        except PmodError as error:
            yield Problem("model", error.message, error.hint or "give the folder of a checkpoint")
            return
        path = str(source)
        if not Path(path).is_dir() and not isinstance(try_to_load_from_cache(path, "config.json"), str):
            yield from self._remote_problems("model", path, "model", f"hf download {path}")

    def _remote_problems(self, who: str, path: str, kind: str, remedy: str) -> Iterator[Problem]:
        """What is wrong with a repository that is not on this machine; ``remedy`` gets it where there is a network."""
        if self.offline:
            yield Problem(who, f"{path} is not on this machine, and the network may not be asked", remedy)
            return
        if path not in self.answers:
            self.answers[path] = self._ask(path, kind)
        if answer := self.answers[path]:
            yield Problem(who, *answer)

    def _ask(self, path: str, kind: str) -> tuple[str, str] | None:
        """What is missing and its remedy, if the hub does not give a repository; else notes its size."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

        try:
            if self.reachable:
                info: Any = HfApi().repo_info(path, repo_type=kind, files_metadata=True, timeout=10)
        except GatedRepoError:
            page = path if kind == "model" else f"datasets/{path}"
            return f"access to {path} has to be asked for", f"at https://huggingface.co/{page}"
        except RepositoryNotFoundError:
            return f"{path} is not on the hub, or needs a login", "check the name; hf auth login"
        except HfHubHTTPError as error:
            return f"the hub refuses {path}: {str(error).splitlines()[0]}", "try again later"
        except Exception:  # whatever the HTTP library of the day raises without a network
            self.reachable = False
        if not self.reachable:
            elsewhere = "where it can: pmod eval --prepare --tasks ...; then copy the HF_HOME folder here"
            return "the hub cannot be reached", elsewhere
        self.sizes[path] = sum(
            file.size or 0
            for file in info.siblings or ()
            if kind == "dataset" or "/" not in file.rfilename  # a model's folders are not loaded
        )
        return None

    def disk_problems(self) -> Iterator[Problem]:
        """Too little room for what would be downloaded: at most the whole repositories."""
        needed = sum(self.sizes.values())
        cache = cache_folder()
        free = free_space(cache / "new")
        if needed > free:
            what = f"up to {needed / 1e9:.1f} GB to download, {free / 1e9:.1f} GB free in {cache}"
            yield Problem("all", what, "export HF_HOME=/a/larger/disk")


def cached(path: str, name: str | None) -> bool:
    """Whether ``datasets`` has its copy of a hub data set's configuration."""
    import datasets
    from datasets.naming import camelcase_to_snakecase

    # What a task's own code loads is where `datasets` itself keeps it.
    own = (path, name) in FURTHER_DATA.values()
    cache = Path(datasets.config.HF_DATASETS_CACHE) if own else cache_folder()
    *owner, short = path.rsplit("/", 1)
    folder = cache / "___".join([*owner, camelcase_to_snakecase(short)])
    return any(folder.glob(f"{name or '*'}/*/*/dataset_info.json"))


def cache_folder() -> Path:
    """Where lmms-eval lets ``datasets`` keep its copies: it has rules of its own, for remote file systems too.

    Raises:
        PmodError: It cannot be made, as for a user without a home.
    """
    from lmms_eval.api.task import _resolve_hf_datasets_cache_dir

    with told_as("the cache of data sets cannot be made", "have HF_HOME name a folder that you may write"):
        return Path(_resolve_hf_datasets_cache_dir())


def _missing_files(path: str, options: dict[str, Any]) -> str | None:
    """The first local file or folder that a task names and that is not there."""
    files = options.get("data_files") or []
    entries = files.values() if isinstance(files, dict) else [files]
    named = [file for entry in entries for file in ([entry] if isinstance(entry, str) else entry)]
    local = [file for file in named if "://" not in file and "*" not in file]
    wanted = [path, *local] if Path(path).is_absolute() else local
    return next((file for file in wanted if not Path(file).exists()), None)
