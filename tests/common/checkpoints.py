"""Checkpoints to convert: the demo's baseline, in one file or several, under the names of today or of earlier."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from pmod_cli.checkpoints.shards import StoredTensor, read_header, write_shard
from pmod_cli.demo.job import BASELINE
from pmod_cli.output.marks import MARKER

LAYERS = 8
HIDDEN = 96


def modern(name: str) -> str:
    """The names of transformers' own modules (``model.language_model.*``)."""
    name = name.replace("language_model.model.", "model.language_model.")
    name = name.replace("language_model.lm_head.", "lm_head.")
    return f"model.{name}" if name.startswith(("vision_tower.", "multi_modal_projector.")) else name


def old(name: str) -> str:
    """The names of the hub's older checkpoints (``vision_tower.vision_model.*``)."""
    return name.replace("vision_tower.", "vision_tower.vision_model.")


def baseline_tensors(rename: Callable[[str], str] = str) -> list[StoredTensor]:
    """The demo baseline's tensors."""
    tensors = read_header(BASELINE / "model.safetensors").values()
    return [tensor.renamed(rename(tensor.name)) for tensor in tensors]


def make_checkpoint(
    folder: Path,
    rename: Callable[[str], str] = str,
    shards: int = 1,
    change: Callable[[dict[str, StoredTensor]], None] | None = None,
    config: dict | None = None,
) -> Path:
    """Write a checkpoint.

    Args:
        folder: Where.
        rename: Of parameters.
        shards: Number of files; 1 gives ``model.safetensors`` without an index.
        change: Changes the tensors, by name, before they are written.
        config: Keys to set in ``config.json``.
    """
    folder.mkdir(parents=True)
    for file in BASELINE.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
    if config:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    tensors = {tensor.name: tensor for tensor in baseline_tensors(rename)}
    if change:
        change(tensors)
    names = sorted(tensors)
    if shards == 1:
        write_shard(folder / "model.safetensors", list(tensors.values()))
        return folder
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file_name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number::shards]
        write_shard(folder / file_name, [tensors[name] for name in part])
        weight_map |= dict.fromkeys(part, file_name)
    index = {"metadata": {"total_size": 1, "note": "as it was"}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, but the marker that says what pmod wrote."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != MARKER]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
