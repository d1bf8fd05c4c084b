"""A folder of a `datasets` table, looked through before `datasets` opens it: it may be a stranger's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pmod_cli.output.errors import PmodError
from pmod_cli.output.reading import check_inside, check_regular, read_json, read_text


def check_folder(folder: Path) -> None:
    """Refuse a folder by which files elsewhere would be read, or that holds what is waited for for ever.

    Its links must stay inside. So must the names in ``configs`` of README.md and in what `save_to_disk` writes.

    Raises:
        PmodError: See above.
        Exception: What parsers raise over its README.md.
    """
    for here, folders, files in os.walk(folder):
        for path in (Path(here, name) for name in (*folders, *files)):
            if path.is_symlink():
                check_inside(path, folder)
            if not path.is_dir() and path.exists():
                check_regular(path)
            if "::" in path.name:  # `datasets` takes what follows for another path
                raise PmodError(f"{path} has a name with ::", "rename it")
        for name in _named(Path(here), top=Path(here) == folder):
            if Path(name).is_absolute() or ".." in Path(name).parts or ":" in name:
                raise PmodError(f"{here} names data outside of it: {name}", "only files inside are read")


def _named(folder: Path, *, top: bool) -> Iterator[str]:
    """What a folder's own files tell `datasets` to read."""
    from huggingface_hub import DatasetCard

    found: list[Any] = []
    if top and (folder / "README.md").is_file():
        found += _configs(DatasetCard.load(folder / "README.md").data.to_dict())
    if top and (folder / ".huggingface.yaml").is_file():
        found += _configs(yaml.safe_load(read_text(folder / ".huggingface.yaml")))
    if (folder / "dataset_dict.json").is_file():
        found.append(read_json(folder / "dataset_dict.json").get("splits"))
    if (folder / "state.json").is_file():
        found.append(read_json(folder / "state.json").get("_data_files"))
    while found:
        each = found.pop()
        if isinstance(each, dict | list):
            found += each.values() if isinstance(each, dict) else each
        elif isinstance(each, str):
            yield each


def _configs(card: Any) -> Iterator[Any]:
    configs = card.get("configs") if isinstance(card, dict) else None
    for config in configs if isinstance(configs, list) else ():
        if isinstance(config, dict):
            yield from (config.get("data_files"), config.get("data_dir"))
