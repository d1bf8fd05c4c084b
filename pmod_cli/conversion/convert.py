"""Writes what was planned, or the baseline again."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pmod_cli.checkpoints.hub import download
from pmod_cli.checkpoints.shards import shard_bytes
from pmod_cli.checkpoints.source import Source, open_source
from pmod_cli.checkpoints.write import (
    Progress,
    Staging,
    check_destination,
    check_space,
    link_is_possible,
)
from pmod_cli.conversion.formats.translation import Translation
from pmod_cli.conversion.plan import Plan
from pmod_cli.conversion.restore import FOLDER, plan_baseline
from pmod_cli.families import find_family
from pmod_cli.modeling.names import is_router


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What `pmod convert` tells of a conversion, done or planned.

    Attributes:
        source: As the user named it.
        destination: The new checkpoint; None if a dry run was not given one.
        format: Format of the source.
        family: Its family.
        recipe: Name of the recipe, or None.
        layers: See `layer_table`; empty for a baseline.
        mean_retention: Mean share of vision tokens over all layers; None for a baseline.
        router_parameters: Parameters added (or, for a baseline, taken away).
        weight_bytes: Size of the baseline's weights.
        notes: What the user should know.
    """

    source: str
    destination: str | None
    format: str
    family: str
    recipe: str | None
    layers: list[dict[str, Any]]
    mean_retention: float | None
    router_parameters: int
    weight_bytes: int
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Everything, in what JSON can write."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class ConvertResult(Conversion):
    """What a conversion did.

    Attributes:
        to: ``pmod`` or ``baseline``.
        methods: Number of weight files by how they were put in place: ``hard link``, ``reflink``, ``copy``,
            ``written``.
        seconds: Wall time.
    """

    to: str
    methods: dict[str, int]
    seconds: float


def convert(
    plan: Plan,
    destination: Path,
    *,
    force: bool = False,
    copy: bool = False,
    progress: Progress | None = None,
) -> ConvertResult:
    """Write what was planned; the destination appears complete or not at all.

    Args:
        plan: See `plan_conversion`.
        destination: Folder of the new checkpoint.
        force: Replace a checkpoint that is there.
        copy: Copy the weights where links would do.
        progress: Called with a number of bytes each time that many more are in place.

    Raises:
        PmodError: The destination exists, cannot be written, or has no room.
    """
    started = time.perf_counter()
    methods = _write(plan.source, plan.checkpoint(), destination, force, copy, progress)
    return ConvertResult(
        **plan.description(),
        destination=str(destination),
        to="pmod",
        methods=methods,
        notes=list(plan.translation.notes),
        seconds=time.perf_counter() - started,
    )


def convert_back(
    source: str | Path,
    destination: Path,
    *,
    revision: str | None = None,
    force: bool = False,
    copy: bool = False,
    progress: Progress | None = None,
) -> ConvertResult:
    """Write the dense baseline of a p-MoD checkpoint: bit for bit what was converted, if it was not trained since.

    Args:
        source: Folder or hub id of a p-MoD checkpoint.
        destination: Folder of the dense checkpoint.
        revision: Hub branch, tag or commit.
        force: Replace a checkpoint that is there.
        copy: Copy the weights where links would do.
        progress: See `convert`.

    Raises:
        PmodError: The source is not p-MoD, or the destination cannot be written.
    """
    started = time.perf_counter()
    opened = open_source(source, revision=revision)
    if opened.revision is not None:
        download(opened.name, opened.revision, [f"{FOLDER}/*"])
    dense = plan_baseline(opened)
    methods = _write(opened, dense, destination, force, copy, progress)
    routers = [t for file in opened.weight_files() for t in file.tensors.values() if is_router(t.name)]
    return ConvertResult(
        source=opened.name,
        destination=str(destination),
        to="baseline",
        format="huggingface",
        family=find_family(opened.model_type).name,
        recipe=None,
        layers=[],
        mean_retention=None,
        router_parameters=sum(math.prod(tensor.shape) for tensor in routers),
        weight_bytes=sum(shard_bytes(shard.tensors) for shard in dense.shards),
        methods=methods,
        notes=list(dense.notes),
        seconds=time.perf_counter() - started,
    )


def bytes_needed(checkpoint: Translation, destination: Path, copy: bool = False) -> int:
    """Disk space that writing takes, as far as it can be known before: links take none."""
    total = sum(
        shard_bytes(shard.tensors)
        for shard in checkpoint.shards
        if copy or shard.linked is None or not link_is_possible(shard.linked, destination)
    )
    for file in checkpoint.files.values():
        total += len(file) if isinstance(file, bytes) else file.stat().st_size
    return total


def _write(
    source: Source,
    checkpoint: Translation,
    destination: Path,
    force: bool,
    copy: bool,
    progress: Progress | None,
) -> dict[str, int]:
    """Write shards and files; returns how many weight files were put in place by which means."""
    check_destination(destination, source.folder, force)
    check_space(destination, bytes_needed(checkpoint, destination, copy))
    with Staging(destination, progress) as staging:
        for shard in checkpoint.shards:
            if shard.linked is not None:
                staging.place(shard.name, shard.linked, copy)
            else:
                staging.write_shard(shard.name, shard.tensors)
        for name, file in checkpoint.files.items():
            staging.write(name, file)
        staging.commit()
        return dict(staging.methods)
