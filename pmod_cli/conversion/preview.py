"""What ``pmod convert --dry-run`` tells: layers, parameters, expected FLOPs and KV cache, disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmod_cli.checkpoints.write import free_space
from pmod_cli.conversion.convert import Conversion, bytes_needed
from pmod_cli.conversion.plan import Plan
from pmod_cli.output.errors import PmodError

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True, kw_only=True)
class Preview(Conversion):
    """What a conversion would do.

    Attributes:
        dry_run: Tells a preview from a result.
        download_bytes: What of the weights has to be downloaded first.
        disk_needed_bytes: Disk space the new checkpoint takes; links take none.
        disk_free_bytes: What is free there.
        expected: See `expected_savings`; None where the model cannot be counted.
    """

    dry_run: bool = True
    download_bytes: int
    disk_needed_bytes: int
    disk_free_bytes: int
    expected: dict[str, Any] | None


def preview(plan: Plan, destination: Path | None = None, copy: bool = False) -> Preview:
    """Describe a conversion without writing anything.

    Args:
        plan: See `plan_conversion`.
        destination: Where the checkpoint would go; the current folder's disk is looked at if None.
        copy: Whether weights would be copied.
    """
    place = destination or Path("checkpoint")
    notes = list(plan.translation.notes)
    try:
        expected = expected_savings(plan)
    except PmodError as error:
        expected = None
        notes.append(f"FLOPs and KV cache are not counted: {error.message}")
    needed, free = bytes_needed(plan.checkpoint(), place, copy), free_space(place)
    if needed > free:
        notes.append("it does not fit on that disk")
    return Preview(
        **plan.description(),
        destination=str(destination) if destination else None,
        download_bytes=plan.weight_bytes if plan.source.remote else 0,
        disk_needed_bytes=needed,
        disk_free_bytes=free,
        expected=expected,
        notes=notes,
    )


def expected_savings(plan: Plan) -> dict[str, Any]:
    """FLOPs and KV cache of a prefill, dense and p-MoD, by the formulas of ``pmod profile``.

    Args:
        plan: See `plan_conversion`.

    Returns:
        ``prompt`` (image ``width`` and ``height`` in pixels, the size that gives most vision tokens;
        ``vision_tokens``; ``text_tokens``), and ``prefill_flops`` and ``kv_bytes`` with ``dense``, ``pmod``, ``ratio``.

    Raises:
        PmodError: The model's vision tower cannot be counted.
    """
    from pmod_cli.profiling import closed_form
    from pmod_cli.profiling.prompt import Workload, default_image_size, image_tokens
    from pmod_cli.profiling.subject import Variant

    geometry = Variant(plan.source.name, plan.translation.config, plan.mod, None).geometry
    size = default_image_size(geometry)
    work = Workload(image_tokens(geometry, size), size, dtype=_DTYPES[plan.layout.dtype])

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
