"""What ``pmod convert --dry-run`` tells: layers, parameters, expected FLOPs and KV cache, disk."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pmod_cli.checkpoints.write import free_space
from pmod_cli.conversion.convert import Plan, bytes_needed, layer_table
from pmod_cli.modeling.schedule import mean_retention
from pmod_cli.output.errors import PmodError

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class Preview:
    """What a conversion would do.

    Attributes:
        source: As the user named it.
        destination: Where the checkpoint would go, or None.
        format: Format of the source.
        family: Its family.
        recipe: Name of the recipe, or None.
        layers: See `layer_table`.
        mean_retention: Mean share of vision tokens over all layers.
        router_parameters: Parameters added.
        weight_bytes: Size of the baseline's weights.
        download_bytes: What of them has to be downloaded first.
        disk_needed_bytes: Disk space the new checkpoint takes; links take none.
        disk_free_bytes: What is free there.
        expected: See `expected_savings`; None where the model cannot be counted.
        notes: What the user should know.
    """

    source: str
    destination: str | None
    format: str
    family: str
    recipe: str | None
    layers: list[dict[str, Any]]
    mean_retention: float
    router_parameters: int
    weight_bytes: int
    download_bytes: int
    disk_needed_bytes: int
    disk_free_bytes: int
    expected: dict[str, Any] | None
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Everything, in what JSON can write."""
        return {"dry_run": True, **asdict(self)}


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
        source=plan.source.name,
        destination=str(destination) if destination else None,
        format=plan.format,
        family=plan.family.name,
        recipe=plan.recipe.name if plan.recipe else None,
        layers=layer_table(plan.mod),
        mean_retention=mean_retention(plan.mod.retention_ratios),
        router_parameters=plan.router_parameters,
        weight_bytes=plan.weight_bytes,
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
