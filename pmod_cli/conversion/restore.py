"""The way back: what a converted checkpoint keeps of its baseline, and the baseline it gives again.

A converted checkpoint has a folder ``baseline`` with the files that conversion replaced, as they were, and
``manifest.json``: which file of the checkpoint is which file of the baseline. A fine-tuned checkpoint has no such
folder; its routers are then taken out of its shards and its config.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pmod_cli.checkpoints.shards import INDEX, SINGLE
from pmod_cli.checkpoints.source import Source
from pmod_cli.conversion.formats.translation import Shard, Translation
from pmod_cli.families import find_family
from pmod_cli.modeling.names import is_router
from pmod_cli.output.errors import PmodError
from pmod_cli.output.files import to_json
from pmod_cli.output.paths import is_file_name
from pmod_cli.output.reading import check_inside

FOLDER = "baseline"
_MANIFEST = "manifest.json"


def index_of(shards: Sequence[Shard]) -> dict[str, Any]:
    """Contents of ``model.safetensors.index.json``."""
    return {
        "metadata": {"total_size": sum(tensor.nbytes for shard in shards for tensor in shard.tensors)},
        "weight_map": dict(sorted((tensor.name, shard.name) for shard in shards for tensor in shard.tensors)),
    }


def baseline_files(translation: Translation) -> dict[str, Path | bytes]:
    """What goes into the folder ``baseline`` of a converted checkpoint, by path relative to the checkpoint."""
    kept: dict[str, Path | bytes] = dict(translation.originals)
    if "config.json" not in kept:
        # Nothing to give back bit for bit: the baseline is the dense transformers checkpoint that was translated.
        kept |= {
            "config.json": to_json(translation.config),
            INDEX: to_json(index_of(translation.shards)),
        }
    files = {name: name for name in translation.files} | {name: f"{FOLDER}/{name}" for name in kept}
    files |= {shard.original or shard.name: shard.name for shard in translation.shards}
    return {
        **{f"{FOLDER}/{name}": file for name, file in kept.items()},
        f"{FOLDER}/{_MANIFEST}": to_json({"files": files}),
    }


def plan_baseline(source: Source) -> Translation:
    """The dense baseline of a p-MoD checkpoint; ``config.json`` and the index are among its files."""
    family = find_family(source.model_type)
    if source.model_type != family.model_type:
        raise PmodError(f"{source.name} is a dense {family.name} checkpoint already")
    weights = {file.name: file for file in source.weight_files()}
    config = {
        **{key: value for key, value in source.config.items() if key not in ("mod", "pmod")},
        "architectures": [family.architecture.removeprefix("Pmod")],
        "model_type": family.base_type,
    }
    manifest = source.json(f"{FOLDER}/{_MANIFEST}")
    if manifest is not None:
        files = _check_manifest(source, manifest, weights)
        shards = [
            Shard(original, list(weights[name].tensors.values()), weights[name].path.resolve())
            for original, name in files.items()
            if name in weights
        ]
        if not any(is_router(tensor.name) for shard in shards for tensor in shard.tensors):
            others: dict[str, Path | bytes] = {
                original: source.folder / name for original, name in files.items() if name not in weights
            }
            return Translation(config, shards, others)
    shards = []
    for file in weights.values():
        kept = [tensor for tensor in file.tensors.values() if not is_router(tensor.name)]
        whole = len(kept) == len(file.tensors)
        if kept:
            shards.append(Shard(file.name, kept, file.path.resolve() if whole else None))
    others = {
        name: path for name, path in source.sidecars().items() if name not in ("config.json", "README.md")
    }
    others["config.json"] = to_json(config)
    if len(shards) == 1:
        shards = [replace(shards[0], name=SINGLE)]
    else:
        others[INDEX] = to_json(index_of(shards))
    notes = ["the weights are those of the p-MoD checkpoint as it is now, routers left out"]
    return Translation(config, shards, others, notes=notes)


def _check_manifest(source: Source, manifest: dict[str, Any], weights: Container[str]) -> dict[str, str]:
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise PmodError(f"{source.name}/{FOLDER}/{_MANIFEST} names no files")
    for original, name in files.items():
        if wrong := [each for each in (original, name.removeprefix(f"{FOLDER}/")) if not is_file_name(each)]:
            raise PmodError(
                f"{FOLDER}/{_MANIFEST} names {wrong[0]!r:.80}, which is not a file of the checkpoint"
            )
        if not (source.folder / name).is_file():
            raise PmodError(f"{source.name} lacks {name}, which belongs to its baseline")
        if name not in weights:
            check_inside(source.folder / name, source.folder)
    return files
