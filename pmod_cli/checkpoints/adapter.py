"""Adapters of PEFT's: what their config says, as far as it may be believed, and the tensors that they bring."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmod_cli.checkpoints.load import ADAPTER_CONFIG, check_files
from pmod_cli.checkpoints.shards import StoredTensor, read_header, read_pickle
from pmod_cli.output.errors import PmodError
from pmod_cli.output.reading import read_json

_PREFIXES = {
    "LORA": "lora_", "ADALORA": "lora_", "LOHA": "hada_", "LOKR": "lokr_", "IA3": "ia3_", "OFT": "oft_",
    "BOFT": "boft_", "HRA": "hra_",
}  # fmt: skip
"""By kind, how the names of its parameters begin in the layers that it changes."""

_UNMERGED = ("alora_invocation_tokens", "arrow_config", "layer_replication", "target_parameters")
"""Settings with which there is no one model that base and adapter make, or none that is told by names of layers."""

_SETTLED: dict[str, Any] = {
    "init_weights": True, "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None,
    "megatron_config": None, "loftq_config": {}, "corda_config": None, "eva_config": None, "lora_ga_config": None,
    "task_type": None, "auto_mapping": None,
}  # fmt: skip
"""What the weights that are there make needless; some of it would have PEFT read files, import modules or search."""

_NAMED = ("target_modules", "feedforward_modules")
"""Layers that the weights name: those that are changed, and of IA3 those that are so at their inputs, in one row."""

_SIZES = (
    "r",
    "init_r",
    "target_r",
    "oft_block_size",
    "boft_block_size",
    "boft_block_num",
    "boft_n_butterfly_factor",
)
_FRESH = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of ``init_lora_weights`` that leave the base as it is."""


@dataclass(frozen=True)
class Adapter:
    """A folder's adapter, checked.

    Attributes:
        base: Folder or hub id of its base, as the folder names it.
        config: What PEFT may be given: `modules` in place of patterns, and nothing that only a new adapter needs.
        modules: Names of the layers that it changes, in the base.
        tensors: By PEFT's names; only headers were read.
    """

    folder: Path
    base: str
    config: dict[str, Any]
    modules: tuple[str, ...]
    tensors: dict[str, StoredTensor]


def open_adapter(folder: Path, allow_pickle: bool = False) -> Adapter:
    """Read an adapter's folder.

    Raises:
        PmodError: It is none, is of a kind that is not merged, has no weights, or only pickled ones that are not
            allowed; or its config asks for what its weights do not bear out.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise PmodError(f"{folder} is not an adapter: it has no {ADAPTER_CONFIG}", "leave --merge out")
    check_files(folder)
    config = read_json(path)
    base, kind = config.get("base_model_name_or_path"), config.get("peft_type")
    if not isinstance(base, str) or not base or not base.isprintable():
        raise PmodError(f"{path} names no base", "write base_model_name_or_path into it")
    if not isinstance(kind, str) or kind not in _PREFIXES:
        raise PmodError(f"{path}: peft_type is {kind!r:.40}", f"pmod merges {', '.join(_PREFIXES)}")
    for key in _UNMERGED:
        if config.get(key):
            raise PmodError(f"{path}: an adapter with {key} cannot be merged")
    tensors = _read(folder, allow_pickle)
    if not tensors:
        raise PmodError(f"{folder} has no weights: they are empty")
    for pattern in _patterns(config):
        # Without groups, and with no more than two repeats, a search is short.
        if not re.fullmatch(r"[\w.^$|\\*+\[\]-]{1,1000}", pattern) or len(re.findall(r"[*+]", pattern)) > 2:
            raise PmodError(f"{path}: {pattern!r:.80} is no name of a layer", "write names in full")
    largest = max((*(side for tensor in tensors.values() for side in tensor.shape), 1))
    ranks = config.get("rank_pattern")
    asked = {key: config.get(key) for key in _SIZES}
    asked |= (
        {f"rank_pattern of {key}": rank for key, rank in ranks.items()} if isinstance(ranks, dict) else {}
    )
    for key, size in asked.items():
        if isinstance(size, int | float) and not size <= largest:
            raise PmodError(
                f"{path}: {key:.80} is {size}, and no side of its weights is longer than {largest}"
            )
    names = re.compile(rf"base_model\.model\.(.+?)\.{_PREFIXES[kind]}")
    changed = {found[1]: tensor.shape for name, tensor in tensors.items() if (found := names.match(name))}
    settled = _SETTLED | {
        "init_lora_weights": _start(path, config),
        "target_modules": sorted(changed),
        "feedforward_modules": sorted(name for name, shape in changed.items() if shape[0] == 1),
    }
    given = config | {key: value for key, value in settled.items() if key in config}
    return Adapter(folder, base, given, tuple(sorted(changed)), tensors)


def _read(folder: Path, allow_pickle: bool) -> dict[str, StoredTensor]:
    safe, pickled = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    if safe.is_file():
        return read_header(safe)
    if pickled.is_file():
        return read_pickle(pickled, allow_pickle)
    raise PmodError(f"{folder} has no weights", f"expected {safe.name}")


def _patterns(config: dict[str, Any]) -> Iterator[str]:
    """What PEFT would search names for."""
    for key, value in config.items():
        if key.endswith(("_modules", "_pattern", "_to_save")) and key not in (*_NAMED, *_SETTLED):
            many = value if isinstance(value, dict | list) else () if value is None else (value,)
            yield from map(str, many)


def _start(path: Path, config: dict[str, Any]) -> Any:
    """``init_lora_weights`` as PEFT needs it, to change the base as it was changed before the adapter was trained."""
    start = config.get("init_lora_weights", True)
    if start in ("pissa", "olora"):
        return start
    if start not in _FRESH:
        raise PmodError(
            f"{path}: init_lora_weights is {start!r:.40}, so the base that it was trained on cannot be made again",
            "save it with PEFT's path_initial_model_for_weight_conversion",
        )
    return True
