"""Finds a checkpoint: a local folder, or a hub id, which is downloaded to (or found in) the hub's cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pmod_cli.checkpoints import hub
from pmod_cli.checkpoints.shards import INDEX, SINGLE, WeightFile, read_header, read_pickle
from pmod_cli.families import refuse_unfit
from pmod_cli.families.defaults import check_config
from pmod_cli.output.errors import PmodError
from pmod_cli.output.paths import is_file_name, user_path
from pmod_cli.output.reading import check_inside, read_json

_PICKLED_INDEX, _PICKLED = "pytorch_model.bin.index.json", "pytorch_model.bin"
WHOLE = (SINGLE, INDEX, _PICKLED, _PICKLED_INDEX)
"""Files that a folder with a whole model's weights has, one of them."""

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".ckpt")


@dataclass(frozen=True)
class Source:
    """A checkpoint as it lies on disk, in whatever format.

    Attributes:
        name: As the user named it.
        folder: In the hub's cache its files are symbolic links.
        revision: The hub commit; None for a local folder.
        remote: Its weights, where only their headers were read, from the hub.
    """

    name: str
    folder: Path
    revision: str | None = None
    remote: tuple[WeightFile, ...] = field(default=(), repr=False)

    @cached_property
    def config(self) -> dict[str, Any]:
        """Contents of its ``config.json``; empty if it has none."""
        config = self.json("config.json") or {}
        refuse_unfit(config.get("model_type"))
        check_config(config)
        return config

    @property
    def model_type(self) -> str:
        """``model_type`` of its config, or an empty string."""
        return str(self.config.get("model_type", ""))

    def json(self, name: str) -> dict[str, Any] | None:
        """Contents of one of its JSON files; None if there is none."""
        path = self.folder / name
        return read_json(path) if path.is_file() else None

    def weight_files(
        self, allow_pickle: bool = False, only: Callable[[str], bool] | None = None
    ) -> list[WeightFile]:
        """Its weights, by the headers alone; the same choice of files as transformers makes.

        Files that by the index have none of the tensors that ``only`` wants are left out.

        Raises:
            PmodError: No weights, an index that names an absent file or tensor, a corrupt or truncated file.
        """
        if self.remote:
            return list(self.remote)
        for single, index, safe in ((SINGLE, INDEX, True), (_PICKLED, _PICKLED_INDEX, False)):
            if (self.folder / single).is_file():
                weight_map = None
                names: Sequence[str] = [single]
            elif (self.folder / index).is_file():
                weight_map = self._weight_map(index)
                if only is not None:
                    weight_map = {name: file for name, file in weight_map.items() if only(name)}
                names = sorted(set(weight_map.values()))
            else:
                continue
            files = []
            for path in (self.folder / name for name in names):
                if not path.is_file():
                    raise PmodError(f"{index} names {path.name}, which is not in {self.name}", "download it")
                tensors = read_header(path) if safe else read_pickle(path, allow_pickle)
                files.append(WeightFile(path, tensors, safe))
            found = {(tensor, file.name) for file in files for tensor in file.tensors}
            for tensor, name in (weight_map or {}).items():
                if (tensor, name) not in found:
                    raise PmodError(
                        f"{index} says that {tensor} is in {name}, and it is not", "download both again"
                    )
            for name, file in found:
                if ".lora_" in name or name.startswith("base_model.model."):
                    raise PmodError(
                        f"{self.name} has unmerged LoRA layers, or PEFT's names ({name} in {file})",
                        "merge them first: PEFT's merge_and_unload, then save_pretrained",
                    )
            for stored in (stored for file in files for stored in file.tensors.values()):
                if 0 in stored.shape:
                    raise PmodError(
                        f"{self.name}: {stored.name} has shape {list(stored.shape)}, which is empty",
                        "a DeepSpeed ZeRO-3 run has to gather its weights when it saves; zero_to_fp32.py does it later",
                    )
            return files
        hint = where_weights_are(self.folder)
        if self.revision is not None and not allow_pickle:
            hint += "; if the repository has .bin files alone, --allow-pickle"
        raise PmodError(f"{self.name} has no weights", hint)

    def _weight_map(self, index: str) -> dict[str, str]:
        weight_map = (self.json(index) or {}).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise PmodError(f"{self.folder / index} has no weight_map")
        for name in weight_map.values():
            if not is_file_name(name):
                raise PmodError(f"{index} names {name!r}, which is not a file of its own folder")
            if index == INDEX and not name.endswith(".safetensors"):
                raise PmodError(f"{index} names {name!r}, which is no safetensors file")
        return weight_map

    def sidecars(self) -> dict[str, Path]:
        """Every other file at its top level (config, tokenizer, processor, licence ...), by name; no link out of it."""
        files = {
            path.name: path
            for path in sorted(self.folder.iterdir())
            if path.is_file()
            and not path.name.startswith(".")
            and not path.name.endswith((*_WEIGHT_SUFFIXES, ".index.json"))
        }
        for path in files.values():
            check_inside(path, self.folder)
        return files


def is_hub_id(name: str | Path) -> bool:
    """Whether a name is meant for the hub: ``user/name``, where no such path exists."""
    return (
        isinstance(name, str)
        and name.count("/") == 1
        and not name.startswith((".", "/", "~"))
        and not Path(name).exists()
    )


def where_weights_are(folder: Path) -> str:
    """What to do about a folder that has none."""
    if (folder / "zero_to_fp32.py").is_file():
        return "a DeepSpeed run's are in shards: zero_to_fp32.py in the folder puts them together"
    return f"expected {SINGLE} or {INDEX}"


def check_exists(name: str | Path, what: str = "folder") -> None:
    """Refuse what is neither a folder (``what`` the error calls it) nor a hub id; the hub is not asked."""
    path = user_path(name)
    if path.is_file():
        raise PmodError(f"{path} is a file, not the folder of a checkpoint")
    if not path.is_dir() and not is_hub_id(name):
        raise PmodError(f"no {what} {name}", "give a folder or a hub id such as llava-hf/llava-1.5-7b-hf")
    if not path.is_dir():
        hub.check_hub_id(str(name))


def open_source(
    name: str | Path,
    *,
    revision: str | None = None,
    allow_pickle: bool = False,
    near: Path | None = None,
    only: Callable[[str], bool] | None = None,
    headers: bool = False,
) -> Source:
    """Find a checkpoint; of a hub id, what the cache does not have is downloaded.

    Args:
        name: Folder or hub id.
        revision: Branch, tag or commit on the hub.
        allow_pickle: Whether to download ``.bin`` weights where there are no safetensors.
        near: A folder to look in first, for a part that a checkpoint names (e.g. its vision tower).
        only: Says of a tensor's name whether it is wanted; weight files without such tensors are not downloaded.
        headers: Read the headers of weights that are not in the cache over the network, and do not download them.

    Raises:
        PmodError: Nothing there, or the hub cannot be reached.
    """
    for path in ([near / name] if near else []) + [user_path(name)]:
        if path.is_dir():
            return Source(str(name), path)
    check_exists(name)
    name = str(name)
    folder = hub.download(name, revision, hub.SMALL_FILES)
    if not any(folder.iterdir()):
        raise PmodError(f"{name} has no files at its top level")
    source = Source(name, folder, folder.name)
    if only is not None and (folder / INDEX).is_file():
        files = {file for tensor, file in source._weight_map(INDEX).items() if only(tensor)}
        hub.download(name, folder.name, sorted(files))
    elif headers and (remote := hub.missing_headers(name, folder)):
        return replace(source, remote=remote)
    elif not any(hub.download(name, folder.name, ["*.safetensors"]).glob("*.safetensors")) and allow_pickle:
        hub.download(name, folder.name, ["*.bin"])
    return source
