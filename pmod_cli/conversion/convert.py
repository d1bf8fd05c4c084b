"""Writes what was planned, or tells it; and writes the baseline again."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from pmod_cli.checkpoints import write
from pmod_cli.checkpoints.hub import download
from pmod_cli.checkpoints.load import refuse_part
from pmod_cli.checkpoints.shards import TORCH_DTYPES, shard_bytes
from pmod_cli.checkpoints.source import Source, open_source
from pmod_cli.conversion.formats.translation import Translation
from pmod_cli.conversion.plan import Plan
from pmod_cli.conversion.restore import FOLDER, plan_baseline
from pmod_cli.families import find_family
from pmod_cli.modeling.names import is_router
from pmod_cli.output.errors import PmodError
from pmod_cli.output.paths import existing_parent


def convert(
    plan: Plan,
    destination: Path,
    *,
    force: bool = False,
    copy: bool = False,
    progress: write.Progress | None = None,
) -> dict[str, Any]:
    """Write what was planned; the destination appears complete or not at all.

    ``force`` replaces a checkpoint that is there, ``copy`` copies weights where links would do.

    Returns:
        What ``docs/json.md`` lists for ``pmod convert --json``, but ``pushed_to``.

    Raises:
        PmodError: The destination exists, cannot be written, or has no room.
    """
    started = time.perf_counter()
    methods = _write(plan.source, plan.checkpoint(), destination, force, copy, progress)
    return {
        **plan.description(destination),
        "to": "pmod",
        "methods": methods,
        "notes": list(plan.translation.notes),
        "seconds": time.perf_counter() - started,
    }


def convert_back(
    source: str | Path,
    destination: Path,
    *,
    revision: str | None = None,
    force: bool = False,
    copy: bool = False,
    progress: write.Progress | None = None,
) -> dict[str, Any]:
    """Write the dense baseline of a p-MoD checkpoint: bit for bit what was converted, if it was not trained since.

    The source is a folder or hub id, ``revision`` a hub branch, tag or commit. For the rest see `convert`.

    Raises:
        PmodError: The source is not p-MoD, or the destination cannot be written.
    """
    started = time.perf_counter()
    opened = open_source(source, revision=revision)
    refuse_part(opened.folder)
    if opened.revision is not None:
        download(opened.name, opened.revision, [f"{FOLDER}/*"])
    dense = plan_baseline(opened)
    methods = _write(opened, dense, destination, force, copy, progress)
    tensors = [tensor for file in opened.weight_files() for tensor in file.tensors.values()]
    return {
        "source": opened.name,
        "destination": str(destination),
        "format": "huggingface",
        "family": find_family(opened.model_type).name,
        "recipe": None,
        "layers": [],
        "mean_retention": None,
        "router_parameters": sum(math.prod(tensor.shape) for tensor in tensors if is_router(tensor.name)),
        "weight_bytes": sum(shard_bytes(shard.tensors) for shard in dense.shards),
        "to": "baseline",
        "methods": methods,
        "notes": list(dense.notes),
        "seconds": time.perf_counter() - started,
    }


def preview(plan: Plan, destination: Path | None = None, copy: bool = False) -> dict[str, Any]:
    """What ``docs/json.md`` lists for ``--dry-run``; nothing is written.

    Without a destination the current folder's disk is looked at.
    """
    path = destination or Path("checkpoint")
    notes = list(plan.translation.notes)
    try:
        expected = expected_savings(plan)
    except PmodError as error:
        expected = None
        notes.append(f"FLOPs and KV cache are not counted: {error.message}")
    needed, free = bytes_needed(plan.checkpoint(), path, copy), write.free_space(path)
    if needed > free:
        notes.append("it does not fit on that disk")
    return {
        **plan.description(destination),
        "dry_run": True,
        "download_bytes": plan.weight_bytes if plan.source.remote else 0,
        "disk_needed_bytes": needed,
        "disk_free_bytes": free,
        "notes": notes,
        "expected": expected,
    }


def expected_savings(plan: Plan) -> dict[str, Any]:
    """FLOPs and KV cache of a prefill, dense and p-MoD, by the formulas of ``pmod profile``.

    The prompt's image has the size that gives most vision tokens.
    """
    from pmod_cli.profiling import closed_form
    from pmod_cli.profiling.prompt import Workload, default_image_size, image_tokens
    from pmod_cli.profiling.subject import Variant, read_pictures

    pictures = read_pictures(plan.source.folder)
    geometry = Variant(plan.source.name, plan.translation.config, plan.mod, None, pictures).geometry
    size = default_image_size(geometry)
    work = Workload(image_tokens(geometry, size), size, dtype=TORCH_DTYPES[plan.layout.dtype])

    def compare(dense: int, pmod: int) -> dict[str, Any]:
        return {"dense": dense, "pmod": pmod, "ratio": pmod / dense}

    flops = [2 * closed_form.prefill(geometry, mod, work).macs for mod in (None, plan.mod)]
    cache = [sum(closed_form.kv_bytes(geometry, mod, work)) for mod in (None, plan.mod)]
    return {
        "prompt": {
            "height": size[0],
            "width": size[1],
            "vision_tokens": work.vision_tokens,
            "text_tokens": work.text_tokens,
        },
        "prefill_flops": compare(*flops),
        "kv_bytes": compare(*cache),
    }


def bytes_needed(checkpoint: Translation, destination: Path, copy: bool = False) -> int:
    """Disk space that writing takes, as far as it can be known before: links take none."""
    device = existing_parent(destination).stat().st_dev
    total = sum(
        shard_bytes(shard.tensors)
        for shard in checkpoint.shards
        if copy or shard.linked is None or existing_parent(shard.linked).stat().st_dev != device
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
    progress: write.Progress | None,
) -> dict[str, int]:
    write.check_destination(destination, source.folder, force)
    write.check_space(destination, bytes_needed(checkpoint, destination, copy))
    weights = {shard.name: shard.linked or shard.tensors for shard in checkpoint.shards}
    files = checkpoint.files
    return write.write_checkpoint(destination, weights, files, copy=copy, force=force, progress=progress)
