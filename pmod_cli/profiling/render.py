"""A profile as tables of text, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pmod_cli.output import units
from pmod_cli.output.tables import Table
from pmod_cli.output.units import size
from pmod_cli.plots import NAMES
from pmod_cli.profiling.closed_form import PARTS
from pmod_cli.profiling.explain import notes
from pmod_cli.profiling.result import FLOPS_PER_MAC, ProfileResult


def profile_tables(result: ProfileResult, by_layer: bool = False) -> list[Table]:
    """The tables of one profile.

    Args:
        result: The profile.
        by_layer: Whether to add a table with one row per decoder layer.
    """
    tables = [_main_table(result)]
    if by_layer:
        tables.append(_layer_table(result))
    return tables


def profile_markdown(result: ProfileResult, by_layer: bool = False) -> str:
    """A profile as Markdown, notes included."""
    blocks = [table.to_markdown() for table in profile_tables(result, by_layer)]
    return "\n\n".join([*blocks, "\n".join(f"- {note}" for note in notes(result))]) + "\n"


def macs(count: int) -> str:
    """MACs and FLOPs of a count, with one unit prefix: ``4.330 / 8.660 T``."""
    flops = FLOPS_PER_MAC * count
    prefix, factor = units.prefix(flops, smallest="k")
    return f"{units.digits(count / factor)} / {units.digits(flops / factor)} {prefix}"


def _percent(value: float | None) -> str:
    """A ratio or share, without the space of `units.share`: the columns are many and narrow."""
    return "-" if value is None else f"{value:.1%}"


@dataclass
class _Rows:
    """Rows with one column per model, and their ratio if there are two."""

    models: int
    rows: list[Sequence[str]] = field(default_factory=list)

    def heading(self, text: str) -> None:
        self.rows.append([text])

    def add(self, label: str, cells: Sequence[str], ratio: float | None = None) -> None:
        self.rows.append([label, *cells, *([_percent(ratio)] if self.models == 2 else [])])

    def compare(self, label: str, values: Sequence[int], show: Callable[[int], str] = macs) -> None:
        ratio = values[1] / values[0] if self.models == 2 and values[0] else None
        self.add(label, [show(value) if value else "-" for value in values], ratio)


def _main_table(result: ProfileResult) -> Table:
    work = result.work
    roles = [role for role in ("dense", "pmod") if role in result.variants]
    models = [result.variants[role] for role in roles]
    rows = _Rows(len(models))
    rows.heading("prefill, MACs / FLOPs")
    rows.compare("all", [model.prefill.macs for model in models])
    for part in PARTS:
        values = [model.prefill.parts[part] for model in models]
        if any(values):
            rows.compare(f"  {part.replace('_', ' ').replace('lm', 'LM')}", values)
    if result.published:
        tera = {"dense": result.published.dense_tflops, "pmod": result.published.pmod_tflops}
        rows.add("published", [f"- / {tera[role]:.2f} T" for role in roles], tera["pmod"] / tera["dense"])
    rows.heading("decode, MACs / FLOPs")
    rows.compare("one step (the first)", [model.decode_step.macs for model in models])
    rows.compare(f"prefill + {work.new_tokens} new tokens", [model.generation_macs for model in models])
    rows.heading("KV cache")
    rows.compare("after prefill", [sum(model.kv_prefill) for model in models], size)
    rows.compare(f"with {work.new_tokens} new tokens", [sum(model.kv_final) for model in models], size)
    rows.heading("tokens a layer keeps (mean)")
    rows.add("vision tokens", [_percent(model.vision_retention) for model in models])
    rows.add("all tokens", [_percent(model.token_retention) for model in models])
    rows.heading("least memory traffic")
    rows.compare("prefill", [model.traffic["prefill"] for model in models], size)
    rows.compare("one decode step", [model.traffic["decode_step"] for model in models], size)
    rows.heading("model")
    rows.compare("parameters", [sum(model.parameters.values()) for model in models], lambda n: f"{n:,}")
    _add_latency(rows, result, roles)
    title = (
        f"{result.model}: {work.vision_tokens} vision + {work.text_tokens} text tokens, batch {work.batch}, "
        f"{work.dtype}, {result.convention} convention"
    )
    ratio = ["ratio"] if len(models) == 2 else []
    return Table(title, ["", *(NAMES[role] for role in roles), *ratio], rows.rows)


def _add_latency(rows: _Rows, result: ProfileResult, roles: Sequence[str]) -> None:
    latency = result.latency
    if latency is None:
        return
    rows.heading(f"measured on {latency.device}, {latency.dtype}")
    models = [latency.models[role] for role in roles]
    labels = {
        "prefill": "prefill (first token)",
        "decode": "decode (all further)",
        "end_to_end": "generate, end to end",
    }
    for phase in models[0].seconds:
        cells = []
        for measured in models:
            timing = measured.seconds[phase]
            spread = f"{min(timing.seconds) * 1e3:.1f}-{max(timing.seconds) * 1e3:.1f}"
            cells.append(f"{units.milliseconds(timing.median)} ({spread})")
        rows.add(labels[phase], cells, latency.ratios.get(f"{phase}_seconds"))
    if models[0].decoded:
        speeds = [m.decoded * latency.batch / m.seconds["decode"].median for m in models]
        rows.add("decode speed", [f"{speed:.1f} tokens/s" for speed in speeds], speeds[-1] / speeds[0])
    rows.compare("KV cache, real bytes", [sum(measured.kv_prefill) for measured in models], size)
    if models[0].peak_memory:
        rows.add("peak device memory", [size(measured.peak_memory or 0) for measured in models])


def _layer_table(result: ProfileResult) -> Table:
    profile = result.variants.get("pmod") or result.variants["dense"]
    dense = result.variants.get("dense")
    ratios = profile.retention_ratios or [None] * len(profile.prefill.layers)
    rows: list[Sequence[str]] = [
        [
            str(index),
            "dense" if ratio is None else f"{ratio:.3f}",
            str(layer.tokens),
            macs(layer.macs),
            size(profile.kv_prefill[index]),
            _percent(layer.macs / dense.prefill.layers[index].macs if dense else None),
        ]
        for index, (layer, ratio) in enumerate(zip(profile.prefill.layers, ratios, strict=True))
    ]
    header = ["layer", "keeps", "tokens", "MACs / FLOPs", "KV cache", "of dense"]
    return Table(f"{NAMES['pmod' if profile.retention_ratios else 'dense']} prefill by layer", header, rows)


_COLUMNS = {
    "ratio": "ratio",
    "tokens": "text tokens",
    "batch": "batch",
    "schedule": "schedule",
    "mod_layers": "MoD",
    "mean_retention": "vision",
    "pmod": "prefill MACs / FLOPs",
    "prefill_flops": "of dense",
    "kv_prefill": "KV",
    "decode_step_traffic": "decode traffic",
    "prefill_seconds": "prefill time",
    "decode_seconds": "decode time",
    "end_to_end_seconds": "end to end",
}


def rows_table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    """A sweep or a comparison of schedules: one row per value, ratios in percent.

    Args:
        title: What it shows.
        rows: What `pmod_cli.profiling.sweep` gave.
    """
    keys = [key for key in _COLUMNS if key in rows[0]]
    if "schedule" in keys:
        keys.remove("decode_step_traffic")  # the same at an equal mean

    def cell(row: dict[str, Any], key: str) -> str:
        if key == "pmod":
            return macs(row["pmod"]["prefill_macs"])
        if key == "schedule":
            return " ".join([row[key], *(f"{value:.4g}" for value in row["setting"].values())])
        plain = key in ("ratio", "tokens", "batch", "mod_layers")
        return str(row[key]) if plain else _percent(row[key])

    cells: list[Sequence[str]] = [[cell(row, key) for key in keys] for row in rows]
    return Table(title, [_COLUMNS[key] for key in keys], cells)


def changes_table(comparison: dict[str, Any]) -> Table:
    """What `compare_files` found, as a table.

    Args:
        comparison: Its result.
    """

    def show(value: Any) -> str:
        if isinstance(value, int) and abs(value) >= 10_000:
            return units.si(value)
        if isinstance(value, float):
            return f"{value:.4g}"
        text = str(value)
        return text if len(text) <= 24 else f"{text[:21]}..."

    rows: list[Sequence[str]] = [
        [
            change["key"].replace(".parts", "").replace(".macs", " MACs"),
            show(change["before"]),
            show(change["after"]),
            _percent(change["ratio"]),
        ]
        for change in comparison["changes"]
        if not change["key"].endswith(".flops")  # twice the MACs
    ]
    title = f"{comparison['before']} -> {comparison['after']}: {len(rows)} figures changed"
    return Table(title, ["figure", "before", "after", "ratio"], rows)
