"""A profile as rows of text, for a rich table on the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pmod_cli.profiling.closed_form import PARTS
from pmod_cli.profiling.explain import notes, size
from pmod_cli.profiling.result import FLOPS_PER_MAC, ProfileResult

if TYPE_CHECKING:
    from rich.table import Table

_PREFIXES = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))
_NAMES = {"dense": "dense", "pmod": "p-MoD"}


@dataclass(frozen=True)
class Grid:
    """A titled table of text.

    Attributes:
        title: What it shows.
        header: Column names.
        rows: One list of cells a row; a row of one cell is a heading.
    """

    title: str
    header: list[str]
    rows: list[list[str]]

    def to_rich(self) -> Table:
        """For the terminal."""
        from rich.table import Table

        table = Table(title=self.title, title_justify="left")
        for index, name in enumerate(self.header):
            # Where the terminal is narrow the header wraps, figures do not.
            widest = max((len(row[index]) for row in self.rows if len(row) > index), default=0)
            table.add_column(name, justify="right" if index else "left", min_width=widest, no_wrap=not index)
        for row in self.rows:
            if len(row) == 1:
                table.add_section()
                table.add_row(f"[bold]{row[0]}[/bold]")
            else:
                table.add_row(*row)
        return table

    def to_markdown(self) -> str:
        """For a README."""
        width = len(self.header)
        lines = [f"**{self.title}**", "", _line(self.header), _line(["---", *["---:"] * (width - 1)])]
        for row in self.rows:
            cells = [f"**{row[0]}**"] if len(row) == 1 else row
            lines.append(_line([*cells, *[""] * (width - len(cells))]))
        return "\n".join(lines)


def profile_grids(result: ProfileResult, by_layer: bool = False) -> list[Grid]:
    """The tables of one profile.

    Args:
        result: The profile.
        by_layer: Whether to add a table with one row a decoder layer.
    """
    grids = [_main_grid(result)]
    if by_layer:
        grids.append(_layer_grid(result))
    return grids


def profile_markdown(result: ProfileResult, by_layer: bool = False) -> str:
    """A profile as Markdown, notes included."""
    blocks = [grid.to_markdown() for grid in profile_grids(result, by_layer)]
    return "\n\n".join([*blocks, "\n".join(f"- {note}" for note in notes(result))]) + "\n"


def macs(count: int) -> str:
    """MACs and FLOPs of a count, with one unit prefix: ``4.330 / 8.660 T``."""
    flops = FLOPS_PER_MAC * count
    unit, factor = next((pair for pair in _PREFIXES if flops >= pair[1]), _PREFIXES[-1])
    return f"{_digits(count / factor)} / {_digits(flops / factor)} {unit}"


def _digits(value: float) -> str:
    return f"{value:#.4g}".rstrip(".")


def share(value: float | None) -> str:
    """A share in percent; a dash for None."""
    return "-" if value is None else f"{value:.1%}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _main_grid(result: ProfileResult) -> Grid:
    work = result.work
    roles: list[str] = [role for role in ("dense", "pmod") if role in result.variants]
    found = [result.variants[role] for role in roles]
    both = len(roles) == 2
    rows: list[list[str]] = []

    def add(label: str, cells: Sequence[str], ratio: float | None = None) -> None:
        rows.append([label, *cells, *([share(ratio)] if both else [])])

    def compare(label: str, values: Sequence[int], show: Callable[[int], str] = macs) -> None:
        ratio = values[1] / values[0] if both and values[0] else None
        add(label, [show(value) if value else "-" for value in values], ratio)

    rows.append(["prefill, MACs / FLOPs"])
    compare("all", [profile.prefill.macs for profile in found])
    for part in PARTS:
        values = [profile.prefill.parts[part] for profile in found]
        if any(values):
            compare(f"  {part.replace('_', ' ').replace('lm', 'LM')}", values)
    if result.published:
        tera = {"dense": result.published.dense_tflops, "pmod": result.published.pmod_tflops}
        add("published", [f"- / {tera[role]:.2f} T" for role in roles], tera["pmod"] / tera["dense"])
    rows.append(["decode, MACs / FLOPs"])
    compare("one step (the first)", [profile.decode_step.macs for profile in found])
    compare(f"prefill + {work.new_tokens} new tokens", [profile.generation_macs for profile in found])
    rows.append(["KV cache"])
    compare("after prefill", [sum(profile.kv_prefill) for profile in found], size)
    compare(f"with {work.new_tokens} new tokens", [sum(profile.kv_final) for profile in found], size)
    rows.append(["tokens a layer keeps (mean)"])
    add("vision tokens", [share(profile.vision_retention) for profile in found])
    add("all tokens", [share(profile.token_retention) for profile in found])
    rows.append(["least memory traffic"])
    compare("prefill", [profile.traffic["prefill"] for profile in found], size)
    compare("one decode step", [profile.traffic["decode_step"] for profile in found], size)
    rows.append(["model"])
    compare("parameters", [sum(profile.parameters.values()) for profile in found], lambda n: f"{n:,}")
    if result.latency:
        rows.append([f"measured on {result.latency.device}, {result.latency.dtype}"])
        _add_latency(result, roles, add)
    title = (
        f"{result.model}: {work.vision_tokens} vision + {work.text_tokens} text tokens, batch {work.batch}, "
        f"{work.dtype}, {result.convention} convention"
    )
    return Grid(title, ["", *(_NAMES[role] for role in roles), *(["ratio"] if both else [])], rows)


def _add_latency(result: ProfileResult, roles: Sequence[str], add: Callable[..., None]) -> None:
    latency = result.latency
    assert latency is not None
    models = [latency.models[role] for role in roles]
    labels = {
        "prefill": "prefill (first token)",
        "decode": "decode (all further)",
        "end_to_end": "generate, end to end",
    }
    for phase, label in labels.items():
        if phase in models[0].seconds:
            cells = []
            for measured in models:
                timing = measured.seconds[phase]
                spread = f"{min(timing.seconds) * 1e3:.1f}-{max(timing.seconds) * 1e3:.1f}"
                cells.append(f"{timing.median * 1e3:.1f} ms ({spread})")
            add(label, cells, latency.ratios.get(f"{phase}_seconds"))
    if models[0].decoded:
        speeds = [m.decoded * latency.batch / m.seconds["decode"].median for m in models]
        ratio = speeds[1] / speeds[0] if len(speeds) == 2 else None
        add("decode speed", [f"{speed:.1f} tokens/s" for speed in speeds], ratio)
    real = [sum(measured.kv_prefill) for measured in models]
    add("KV cache, real bytes", [size(value) for value in real], real[-1] / real[0])
    if models[0].peak_memory:
        add("peak device memory", [size(measured.peak_memory or 0) for measured in models])


def _layer_grid(result: ProfileResult) -> Grid:
    profile = result.variants.get("pmod") or result.variants["dense"]
    dense = result.variants.get("dense")
    rows = []
    for index, layer in enumerate(profile.prefill.layers):
        ratio = profile.retention_ratios[index] if profile.retention_ratios else None
        row = [str(index), "dense" if ratio is None else f"{ratio:.3f}", str(layer.tokens), macs(layer.macs)]
        row.append(size(profile.kv_prefill[index]))
        row.append(share(layer.macs / dense.prefill.layers[index].macs) if dense else "-")
        rows.append(row)
    header = ["layer", "keeps", "tokens", "MACs / FLOPs", "KV cache", "of dense"]
    return Grid(f"{_NAMES['pmod' if profile.retention_ratios else 'dense']} prefill by layer", header, rows)


def rows_grid(title: str, rows: Sequence[dict[str, Any]]) -> Grid:
    """A sweep or a comparison of schedules: one row a value, ratios in percent.

    Args:
        title: What it shows.
        rows: What `pmod_cli.profiling.sweep` gave.
    """
    columns = {
        "ratio": "ratio",
        "tokens": "text tokens",
        "batch": "batch",
        "schedule": "schedule",
        "mod_layers": "MoD",
        "mean_retention": "vision",
        "prefill": "prefill MACs / FLOPs",
        "prefill_flops": "of dense",
        "kv_prefill": "KV",
        "decode_step_traffic": "decode traffic",
        "prefill_seconds": "prefill time",
        "decode_seconds": "decode time",
        "end_to_end_seconds": "end to end",
    }
    if "schedule" in rows[0]:
        del columns["decode_step_traffic"]  # the same at an equal mean

    def cell(row: dict[str, Any], key: str) -> str:
        if key == "prefill":
            return macs(row["pmod"]["prefill_macs"])
        if key == "schedule":
            return " ".join([row[key], *(f"{value:.4g}" for value in row["setting"].values())])
        plain = key in ("ratio", "tokens", "batch", "mod_layers")
        return str(row[key]) if plain else share(row[key])

    present = [key for key in columns if key in rows[0] or key == "prefill"]
    cells = [[cell(row, key) for key in present] for row in rows]
    return Grid(title, [columns[key] for key in present], cells)


def changes_grid(comparison: dict[str, Any]) -> Grid:
    """What `compare_files` found, as a table.

    Args:
        comparison: Its result.
    """

    def show(value: Any) -> str:
        if isinstance(value, int) and abs(value) >= 10_000:
            unit, factor = next(pair for pair in _PREFIXES if abs(value) >= pair[1])
            return f"{_digits(value / factor)} {unit}"
        if isinstance(value, float):
            return f"{value:.4g}"
        text = str(value)
        return text if len(text) <= 24 else f"{text[:21]}..."

    rows = [
        [
            change["key"].replace(".parts", "").replace(".macs", " MACs"),
            show(change["before"]),
            show(change["after"]),
            share(change["ratio"]),
        ]
        for change in comparison["changes"]
        if not change["key"].endswith(".flops")  # twice the MACs
    ]
    title = f"{comparison['before']} -> {comparison['after']}: {len(rows)} figures changed"
    return Grid(title, ["figure", "before", "after", "ratio"], rows)
