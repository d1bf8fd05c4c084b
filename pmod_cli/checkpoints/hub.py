"""The Hugging Face hub: fetching checkpoints through its cache, and pushing them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pmod_cli.checkpoints.shards import INDEX, SINGLE, StoredTensor, WeightFile
from pmod_cli.output.errors import PmodError, first_line
from pmod_cli.output.marks import MARKER
from pmod_cli.output.reading import read_json

SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "README.md", "LICENSE*", "NOTICE*")
"""Everything but weights."""


@contextmanager
def _one_line_errors(what: str) -> Iterator[None]:
    try:
        yield
    except PmodError:
        raise
    except Exception as error:  # the client's HTTP library, and so its errors, change between versions
        from huggingface_hub import constants

        raise PmodError(
            f"{what}: {first_line(error)}",
            "HF_HUB_OFFLINE is set"
            if constants.HF_HUB_OFFLINE
            else "check name and network; hf auth login where it is private",
        ) from error


def download(repo: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Fetch the files whose names match; returns the folder in the cache, which has the commit's name.

    Only files at the top level match, unless a pattern has a slash: some repositories keep the weights in a second
    format in sub-folders, and a converted checkpoint keeps its baseline's files in one.

    Raises:
        PmodError: The repository does not exist, is closed to the user, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    ignored = None if any("/" in pattern for pattern in patterns) else ["*/*"]
    with _one_line_errors(f"no folder {repo}, and it cannot be had from the hub"):
        return Path(
            snapshot_download(repo, revision=revision, allow_patterns=[*patterns], ignore_patterns=ignored)
        )


def missing_headers(repo: str, folder: Path) -> tuple[WeightFile, ...]:
    """The headers of a repository's safetensors files, read over the network; none if the cache has the files.

    ``folder`` is the repository's in the cache, small files included.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError

    if (folder / SINGLE).is_file():
        return ()
    if (folder / INDEX).is_file():
        names = set((read_json(folder / INDEX).get("weight_map") or {}).values())
        if all((folder / str(name)).is_file() for name in names):
            return ()
    with _one_line_errors(f"cannot read the headers of {repo}"):
        try:
            found = HfApi().get_safetensors_metadata(repo, revision=folder.name)
        except NotASafetensorsRepoError:
            return ()

    def not_here() -> list[bytes]:
        raise PmodError(f"the weights of {repo} were not downloaded")

    return tuple(
        WeightFile(
            folder / name,
            {
                tensor: StoredTensor(tensor, entry.dtype, tuple(entry.shape), not_here)
                for tensor, entry in metadata.tensors.items()
            },
        )
        for name, metadata in sorted(found.files_metadata.items())
    )


def check_hub_id(name: str, what: str = "") -> None:
    """Refuse a name that no repository of the hub can have, as a `PmodError` about ``what``."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise PmodError(f"{what}{name[:100]}: {first_line(error)}", "user/name is meant") from None


def check_push(repo: str) -> None:
    """Refuse a push that cannot be before anything is done: no name of a repository, no network wanted, no login."""
    from huggingface_hub import constants, get_token

    check_hub_id(repo, "--push-to-hub ")
    if constants.HF_HUB_OFFLINE:
        raise PmodError("--push-to-hub needs the hub, and HF_HUB_OFFLINE is set", "unset it, or push later")
    if get_token() is None:
        raise PmodError("--push-to-hub needs a login", "run hf auth login, or set HF_TOKEN")


def push(folder: Path, repo: str, private: bool = False) -> str:
    """Upload a checkpoint to ``user/name`` as one commit, whose address is returned; the repository is made if need be.

    Raises:
        PmodError: The hub refuses or cannot be reached; the checkpoint stays where it is.
    """
    from huggingface_hub import HfApi

    with _one_line_errors(f"{folder} is complete, but could not be pushed to {repo}"):
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        # TensorBoard's events hold the paths of the machine that trained.
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message="p-MoD checkpoint",
            ignore_patterns=[MARKER, "runs/*"],
        )
        return str(commit.commit_url)
