"""A profile as tables of text, for the terminal and for Markdown, and in words what its figures mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pmod_cli.output import units
from pmod_cli.output.tables import Table
from pmod_cli.output.units import size
from pmod_cli.plots import NAMES
from pmod_cli.profiling.closed_form import PARTS
from pmod_cli.profiling.profile import FLOPS_PER_MAC, figure, sides

percent = "{:.1%}".format
"""A ratio or share, without the space of `units.share`: the columns are many and narrow."""

Line = tuple[str] | tuple[str, str, Callable[[Any], str]]
"""A heading, or the label of a figure, where it is in one model's JSON, and how it is shown."""


def profile_table(result: dict[str, Any]) -> Table:
    """What a profile counted and measured."""
    work, measured, new = result["workload"], result["latency"] or {}, result["workload"]["new_tokens"]
    lines: list[Line] = [
        ("prefill, MACs / FLOPs",),
        ("all", "prefill.macs", macs),
        *(
            (f"  {part.replace('_', ' ').replace('lm', 'LM')}", f"prefill.parts.{part}.macs", macs)
            for part in PARTS
        ),
        ("published", "published", lambda tera: f"- / {tera:.2f} T"),
        ("decode, MACs / FLOPs",),
        ("one step (the first)", "decode_step.macs", macs),
        (f"prefill + {new} new tokens", "generation.macs", macs),
        ("KV cache",),
        ("after prefill", "kv_cache.prefill_bytes", size),
        (f"with {new} new tokens", "kv_cache.final_bytes", size),
        ("kept by a layer (mean)",),
        ("vision tokens", "retention.vision", percent),
        ("all tokens", "retention.all", percent),
        ("least memory traffic",),
        ("prefill", "least_traffic_bytes.prefill", size),
        ("one decode step", "least_traffic_bytes.decode_step", size),
        ("model",),
        ("parameters", "parameters.total", lambda count: f"{count:,}"),
        (f"measured on {measured.get('device')}, {measured.get('dtype')}",),
        ("prefill at a new prompt length", "latency.seconds.first_prefill", _spread),
        ("prefill (first token)", "latency.seconds.prefill", _spread),
        ("decode (all further)", "latency.seconds.decode", _spread),
        ("generate, end to end", "latency.seconds.end_to_end", _spread),
        ("operators of a prefill", "latency.operators.prefill", str),
        ("operators of a decode step", "latency.operators.decode_step", str),
        ("device busy in a prefill", "latency.device_busy_seconds.prefill", units.milliseconds),
        ("decode speed", "latency.decode_tokens_per_second", lambda speed: f"{speed:.1f} tokens/s"),
        ("KV cache, real bytes", "latency.kv_cache.prefill_bytes", size),
        ("peak device memory", "latency.peak_memory_bytes", size),
    ]
    title = (
        f"{result['model']}: {work['vision_tokens']} vision + {work['text_tokens']} text tokens, "
        f"batch {work['batch']}, {work['dtype']}, {result['convention']} convention"
    )
    return cost_table(title, result, lines, "ratio", percent)


def cost_table(
    title: str,
    data: Mapping[str, Any],
    lines: Sequence[Line],
    ratio_title: str,
    show_ratio: Callable[[float], str],
) -> Table:
    """Figures of a profile, one column per model, and p-MoD over dense if there are both.

    Of ``lines`` the figures that no model has are left out, and headings without figures. A path leads into one of
    the `sides` of the profile ``data``.
    """
    models = sides(data)
    rows: list[Sequence[str]] = []
    heading = ""
    for line in lines:
        if len(line) == 1:
            heading = line[0]
            continue
        label, path, show = line
        values = [figure(side, path) for side in models.values()]
        if not any(values):
            continue
        if heading:
            rows.append([heading])
            heading = ""
        row = [label, *(show(value) if value else "-" for value in values)]
        if len(models) == 2:
            dense, pmod = (value["median"] if isinstance(value, dict) else value for value in values)
            row.append(show_ratio(pmod / dense) if dense and pmod is not None else "-")
        rows.append(row)
    header = ["", *(NAMES[role] for role in models), *([ratio_title] if len(models) == 2 else [])]
    return Table(title, header, rows)


def macs(count: int) -> str:
    """MACs and FLOPs of a count, with one unit prefix: ``4.330 / 8.660 T``."""
    flops = FLOPS_PER_MAC * count
    prefix, factor = units.prefix(flops, smallest="k")
    return f"{units.digits(count / factor)} / {units.digits(flops / factor)} {prefix}"


def _spread(timing: Mapping[str, float]) -> str:
    return f"{units.milliseconds(timing['median'])} ({timing['min'] * 1e3:.1f}-{timing['max'] * 1e3:.1f})"


_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "ratio": ("ratio", str),
    "tokens": ("text tokens", str),
    "batch": ("batch", str),
    "schedule": ("schedule", str),
    "mod_layers": ("MoD", str),
    "mean_retention": ("vision", percent),
    "pmod": ("prefill MACs / FLOPs", lambda side: macs(side["prefill_macs"])),
    "prefill_flops": ("of dense", percent),
    "kv_prefill": ("KV", percent),
    "decode_step_traffic": ("decode traffic", percent),
    "prefill_seconds": ("prefill time", percent),
    "decode_seconds": ("decode time", percent),
    "end_to_end_seconds": ("end to end", percent),
}


def rows_table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    """What `pmod_cli.profiling.sweep.sweep` gave: one row per value, ratios in percent."""
    columns = {key: column for key, column in _COLUMNS.items() if key in rows[0]}
    if "schedule" in columns:
        del columns["decode_step_traffic"]  # the same at an equal mean
        settings = ["".join(f" {value:.4g}" for value in row["setting"].values()) for row in rows]
        rows = [
            row | {"schedule": row["schedule"] + setting} for row, setting in zip(rows, settings, strict=True)
        ]
    cells = [[show(row[key]) for key, (_, show) in columns.items()] for row in rows]
    return Table(title, [name for name, _ in columns.values()], cells)


def notes(result: dict[str, Any]) -> list[str]:
    """Sentences to print under the table: how was counted and measured, and where a saving does not show."""
    how = f"by {result['counted_by']} on the meta device"
    if result["counted_by"] == "formula":
        how = "by formula (docs/profile.md)"
    lines = [f"MACs {how}; one MAC is one multiply-add, two FLOPs."]
    if "formula" in result["checks"]:
        lines.append(
            "The closed form agrees in every part and layer."
            if result["checks"]["formula"]
            else "WARNING: the closed form does NOT agree; please report this model's config."
        )
    if result["convention"] == "paper":
        lines.append(
            "Paper convention: 30 text tokens by default, no attention score and value products, one crop through the "
            "whole vision tower, LM head on all positions over the original vocabulary."
        )
        if result["published"] is None:
            lines.append("The paper publishes no TFLOPs for this model.")
    latency = result["latency"]
    if latency is None:
        return lines
    if latency["random_weights"]:
        lines.append("Weights are random (only a config was given); times do not depend on their values.")
    lines.append(
        f"Dense and p-MoD alternate: medians of {latency['repeats']} runs, fastest and slowest in brackets; "
        f"CPU threads: {latency['threads']}; the process used at most {size(latency['process_peak_bytes'])} of memory."
    )
    overhead = latency["bound_overhead"]
    if overhead is not None:
        why = "; routing, gathering and scattering make the difference."
        if overhead < 0:
            why = ", below its own bound: runs scatter by more. Use more --repeats on a quiet machine."
        lines.append(
            f"p-MoD's prefill takes {overhead:+.0%} over the bound in which each layer runs on its kept tokens and "
            f"nothing else is done{why}"
        )
    if "decode_seconds" in result["ratios"]:
        traffic = result["dense"]["least_traffic_bytes"]["decode_step"]
        cache = result["dense"]["kv_cache"]["prefill_bytes"]
        lines.append(
            f"Of the {size(traffic)} that a dense decode step must read, the KV cache is {cache / traffic:.1%} and the "
            f"rest weights, so p-MoD's traffic falls to {result['ratios']['decode_step_traffic']:.1%} and no further; "
            "larger batches and longer prompts save more."
        )
    return lines
