"""Checks of a checkpoint before it is loaded: none of them reads weights, and only `read_config` asks the hub."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pmod_cli.checkpoints.source import WHOLE, Source, check_exists, open_source
from pmod_cli.families import find_family
from pmod_cli.families.defaults import check_config
from pmod_cli.output.errors import PmodError, told_as
from pmod_cli.output.reading import check_regular, read_json

ADAPTER_CONFIG = "adapter_config.json"
"""Settings of an adapter of PEFT's, in its folder."""

ORIGINAL_DECODERS = {
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
    "llava": "llama",
}
"""The language model of each ``model_type`` that LLaVA's own code wrote."""

_TEXTS = (".json", ".jinja", ".txt", ".model")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def is_released(config: dict[str, Any]) -> bool:
    """Whether a config is of the paper's released p-MoD format."""
    return config.get("model_type") == "pmod_llava_llama"


def is_original(config: dict[str, Any]) -> bool:
    """Whether a config is of the original LLaVA format; its first release has transformers' ``model_type`` llava."""
    return config.get("model_type") in ORIGINAL_DECODERS and "mm_vision_tower" in config


def refuse_unconverted(source: Source) -> None:
    """Refuse a checkpoint in the paper's released or the original LLaVA format, which only conversion reads."""
    if is_released(source.config) or is_original(source.config):
        whose = "paper's released p-MoD" if is_released(source.config) else "original LLaVA"
        raise PmodError(f"{source.name} is in the {whose} format", "pmod convert it first")


def refuse_part(folder: Path) -> None:
    """Refuse a folder that has only an adapter or a projector, and no whole model."""
    if not _without_weights(folder):
        return
    if (folder / ADAPTER_CONFIG).is_file() or any(folder.glob("adapter_model.*")):
        config = read_json(folder / ADAPTER_CONFIG) if (folder / ADAPTER_CONFIG).is_file() else {}
        base = config.get("base_model_name_or_path") or "its base"
        merge = f"pmod convert {folder} NEW --merge"
        if (folder / "non_lora_trainables.bin").is_file():
            merge = "scripts/merge_lora_weights.py of LLaVA's own code"
        kind = config.get("peft_type", "LORA")
        what = "a LoRA adapter" if kind == "LORA" else f"an adapter of kind {kind}"
        raise PmodError(
            f"{folder} is {what}, not a whole checkpoint",
            f"{merge} merges it into {base}",
        )
    for name in ("mm_projector.safetensors", "mm_projector.bin", "non_lora_trainables.bin"):
        if (folder / name).is_file():
            raise PmodError(
                f"{folder} has only a projector ({name}), no whole checkpoint",
                "pmod convert LANGUAGE_MODEL --projector FOLDER --vision-tower ID puts a model together",
            )


def check_source(source: str | Path) -> None:
    """Refuse what is plainly no checkpoint or has to be converted first, before anything is loaded or downloaded."""
    check_exists(source, "checkpoint folder")
    path = Path(source)
    if path.is_dir():
        refuse_part(path)
        if not (path / "config.json").is_file():
            raise PmodError(f"{path} is not a checkpoint: it has no config.json")
        check_files(path)
        refuse_unconverted(open_source(path))
        if (path / ADAPTER_CONFIG).is_file():
            raise _with_adapter(path)


def _with_adapter(source: str | Path) -> PmodError:
    """For what transformers would put an adapter on, whatever that holds and wherever it says its base is."""
    return PmodError(
        f"{source} holds an adapter ({ADAPTER_CONFIG})",
        "move it into a folder of its own; pmod convert --merge merges it into its base",
    )


def check_files(folder: Path) -> None:
    """Refuse a folder with pipes, devices or texts of a size that cannot be meant: libraries would read them."""
    for file in folder.iterdir():
        if not file.is_dir():
            check_regular(file, 2**28 if file.suffix in _TEXTS else None)


@contextmanager
def loading(source: str | Path, where: str = "cannot load") -> Iterator[None]:
    """Make a `PmodError` of whatever transformers raises over a checkpoint, or its processor."""
    try:
        with told_as(f"{where} {source}"):
            yield
    except PmodError as error:
        if "trust_remote_code" in str(error.__cause__):
            raise PmodError(f"{source} needs code of its own (auto_map), and pmod runs none") from error
        raise


def read_config(source: str | Path) -> Any:
    """The transformers config of a checkpoint of a supported family: a folder or hub id. Else a `PmodError`.

    A dense model of another family may be one that ``convert --any`` takes, to be compared with its p-MoD model.
    """
    check_source(source)
    from transformers import AutoConfig, PreTrainedConfig
    from transformers.utils.peft_utils import find_adapter_config_file

    where = "cannot load" if Path(source).is_dir() else "no such folder, nor to be had from the hub:"
    with loading(source, where):
        if not Path(source).is_dir():
            if find_adapter_config_file(str(source)) is not None:
                raise _with_adapter(source)
            check_config(PreTrainedConfig.get_config_dict(source)[0])
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if hasattr(type(config), "mod_config"):
            _ = config.mod_config  # which checks it
    find_family(config.model_type, unlisted=True)
    return config


def check_weights(source: str | Path, allow_pickle: bool = False) -> None:
    """Refuse a folder without a model's weights, or whose weight files are not what transformers may be given.

    An unfinished download or a sharded training run leaves such a folder; an index may name anything. Only the headers
    are read.
    """
    folder = Path(source)
    if not folder.is_dir():
        return
    if (
        not allow_pickle
        and not any((folder / name).is_file() for name in WHOLE[:2])
        and not _without_weights(folder)
    ):
        raise PmodError(
            f"{folder} has pickled weights alone, which could run code",
            "pmod convert --allow-pickle makes safetensors of .bin weights",
        )
    opened = Source(str(source), folder)
    files = opened.weight_files(allow_pickle)
    largest = max((tensor.nbytes for file in files for tensor in file.tensors.values()), default=0)
    for part in (opened.config, opened.config.get("text_config"), opened.config.get("vision_config")):
        for key in ("intermediate_size", "vocab_size", "num_channels"):
            sizes = [(part or {}).get(each) or 1 for each in ("hidden_size", key)]
            # Of 4 bits each at the least. transformers makes a matrix of that size before it looks.
            if math.prod(sizes) > 2 * largest:
                raise PmodError(
                    f"{source}: no tensor is as large as config.json's {key}, {sizes[1]}, makes it"
                )


def _without_weights(folder: Path) -> bool:
    return folder.is_dir() and not any((folder / name).is_file() for name in WHOLE)


def check_tokenizer(source: str | Path) -> None:
    """Refuse a folder without a tokenizer: transformers' own error is a list of ways to make one."""
    folder = Path(source)
    if folder.is_dir() and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise PmodError(f"{folder} has no tokenizer", "pmod convert --tokenizer names one")


@contextmanager
def quiet_transformers(*, bars: bool = False) -> Iterator[None]:
    """Only errors of transformers are shown, and ``bars`` of its progress.

    What it warns of while it loads is meant (a dense checkpoint has no routers) or an error of ours, in one line.
    """
    from transformers.utils import logging

    verbosity, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
