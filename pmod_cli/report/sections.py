"""Summary, pictures, recipe, cost, training and environment; a section without contents is left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pmod_cli import plots
from pmod_cli.modeling.schedule import mean_retention
from pmod_cli.output.tables import Table
from pmod_cli.output.units import milliseconds, share, si, signed, size
from pmod_cli.report import figures
from pmod_cli.report.collect import Found, Profile
from pmod_cli.report.document import Block, Figure, Link, Notes, Section, Text, Tiles, relative
from pmod_cli.report.models import Model, compare, short_names

_WHAT = (
    "In a p-MoD model most decoder layers process only some of a picture's tokens: a router weighs them, and the layer "
    "keeps those with the largest weights. Text is always processed. That saves work and KV cache; what it costs in "
    "accuracy is measured against a dense model."
)

_CURVES = (
    "As logged during training. Fate changed: tokens of a fixed batch that a layer skips now and kept at the look "
    "before, or the reverse, mean over the routed layers."
)


def summary(found: Found, tuned: Model | None, other: Model | None) -> Section:
    """The few figures to see first."""
    tiles: list[tuple[str, str, str]] = []
    for profile in found.profiles[:1]:
        ratios = profile.result["ratios"]
        for key, what, why in (
            ("prefill_flops", "prefill FLOPs", "work before the first token"),
            ("kv_prefill", "KV cache", "memory that each sequence holds"),
            ("prefill_seconds", "prefill time", "measured"),
        ):
            if key in ratios:
                tiles.append((f"{signed(100 * (ratios[key] - 1))} %", what, f"{why}, p-MoD against dense"))
        retention = (profile.result.get("pmod") or {}).get("retention", {}).get("vision")
        if retention is not None:
            tiles.append((share(retention), "of the vision tokens", "kept by a layer, on average"))
    if tuned and other:
        for task in (task for task in tuned.scores if task in other.scores):
            gap = compare(tuned, other, task)
            if gap is not None:
                scores = f"{tuned.scores[task]['value']:.1f} against {other.scores[task]['value']:.1f}"
                inside = f"95 % interval {signed(gap.low)} to {signed(gap.high)}"
                what = f"points on {task}"
                tiles.append(
                    (signed(gap.points), what, f"{scores}, {tuned.label} against {other.label}; {inside}")
                )
                break
    return Section("Summary", [Text(_WHAT), Tiles(tiles)] if tiles else [])


def pictures(found: Found, folder: Path) -> Section:
    """What pmod drew, and the pages that lie beside the report."""
    blocks: list[Block] = []
    for path in found.pictures:
        from PIL import Image

        with Image.open(path) as image:
            title = image.info.get("Title") or path.stem.replace("_", " ")
        blocks.append(Figure(path.stem, title, path.read_bytes()))
    blocks += [Link("Layer by layer: the page with a slider", relative(page, folder)) for page in found.pages]
    if blocks:
        blocks.insert(
            0, Text("Grey patches were skipped by a layer; their tokens pass it unchanged but for a weight.")
        )
    return Section("Where the vision tokens go", blocks)


def recipe(found: Found) -> Section:
    """How the p-MoD models were made and trained."""
    blocks: list[Block] = []
    drawn: list[list[float | None]] = []
    for path, conversion in found.conversions.items():
        ratios = conversion["mod"].get("retention_ratios")
        if not ratios or ratios in drawn:
            continue
        drawn.append(ratios)
        name = found.names.get(str(path.resolve()), path.name)
        routed = sum(ratio is not None for ratio in ratios)
        blocks.append(
            figures.retention_figure(
                ratios,
                f"Retention ratio by layer of {name}: {routed} of {len(ratios)} layers route, "
                f"mean {share(mean_retention(ratios))}; grey layers are dense.{_origin(conversion)}",
            )
        )
    rows, columns = _settings(found)
    if columns:
        blocks.append(Table("", ["", *columns], rows))
    return Section("Recipe", blocks)


def _origin(conversion: Mapping[str, Any]) -> str:
    """What the checkpoint was converted from, if its config says so."""
    source, by = conversion.get("source"), conversion.get("recipe")
    if not source:
        return ""
    return f" Converted from {source}" + (f" by the recipe {by['name']}." if by else ".")


def _settings(found: Found) -> tuple[list[list[str]], list[str]]:
    """Settings of all trainings side by side; those that are the recipe's default everywhere are left out."""
    from pmod_cli.recipe import ModSettings, TrainSettings

    runs = [training for training in found.trainings if training.summary]
    columns = short_names([str(training.path.resolve()) for training in runs], found.names)
    rows: list[list[str]] = []
    summaries = [training.summary or {} for training in runs]
    for label, read in (
        ("recipe", lambda s: s["recipe"]["name"]),
        ("start", lambda s: Path(s["model"]).name),
        ("steps", lambda s: s["result"]["steps"]),
        ("samples", lambda s: s["result"]["samples"]),
        ("wall time", lambda s: f"{s['result']['seconds']:.0f} s"),
        ("trained parameters", lambda s: f"{sum(p['trained'] for p in s['result']['parts']):,}"),
        ("processes", lambda s: s["processes"]),
    ):
        rows.append([label, *(_cell(read, summary) for summary in summaries)])
    for section, defaults in (("mod", ModSettings()), ("train", TrainSettings())):
        chosen = []
        for key, default in defaults.model_dump(mode="json").items():
            values = [summary.get("recipe", {}).get(section, {}).get(key, default) for summary in summaries]
            if any(value != default for value in values) or key in ("schedule", "learning_rate"):
                chosen.append([f"{section}.{key}", *("-" if v is None else str(v) for v in values)])
        rows += [[f"{section}, where it is not the default"], *chosen] if chosen else []
    return rows, columns


def _cell(read: Callable[[dict[str, Any]], Any], summary: dict[str, Any]) -> str:
    try:
        return str(read(summary))
    except (KeyError, TypeError):
        return "-"


def cost(found: Found) -> Section:
    """What was counted and measured."""
    blocks: list[Block] = []
    for profile in found.profiles:
        blocks += [_cost_table(profile, found.names), Notes(_cost_notes(profile.result))]
    return Section("Cost", blocks)


def _cost_table(profile: Profile, names: Mapping[str, str]) -> Table:
    result = profile.result
    sides = {role: result[role] for role in ("dense", "pmod") if result.get(role)}
    latency = (result.get("latency") or {}).get("models", {})
    rows: list[list[str]] = []

    def add(label: str, read: Callable[[str], float], show: Callable[[float], str], part: str = "") -> None:
        try:
            values = [read(role) for role in sides]
        except (KeyError, TypeError):
            return
        if any(value is None for value in values):
            return
        if part and [part] not in rows:
            rows.append([part])
        both = len(values) == 2 and values[0]
        rows.append([label, *map(show, values), *([share(values[1] / values[0])] if both else [])])

    add("prefill", lambda r: sides[r]["prefill"]["flops"], si, "FLOPs")
    add("one decode step", lambda r: sides[r]["decode_step"]["flops"], si)
    add("prefill and all new tokens", lambda r: sides[r]["generation"]["flops"], si)
    add("after prefill", lambda r: sides[r]["kv_cache"]["prefill_bytes"], size, "KV cache")
    add("with all new tokens", lambda r: sides[r]["kv_cache"]["final_bytes"], size)
    add("vision tokens", lambda r: sides[r]["retention"]["vision"], share, "kept by a layer, on average")
    add("all tokens", lambda r: sides[r]["retention"]["all"], share)
    add("parameters", lambda r: sides[r]["parameters"]["total"], lambda v: f"{v:,.0f}", "model")
    measured = f"measured on {(result.get('latency') or {}).get('device')}"
    for phase, label in (
        ("prefill", "prefill (first token)"),
        ("decode", "decode (all further tokens)"),
        ("end_to_end", "end to end"),
    ):
        add(label, lambda r, p=phase: latency[r]["seconds"][p]["median"], milliseconds, measured)  # type: ignore[misc]
    add("KV cache, real bytes", lambda r: latency[r]["kv_cache"]["prefill_bytes"], size, measured)
    add("peak device memory", lambda r: latency[r]["peak_memory_bytes"], size, measured)
    header = ["", *(plots.NAMES[role] for role in sides), *(["p-MoD / dense"] if len(sides) == 2 else [])]
    model = str(result["model"])
    return Table(names.get(model) or Path(model).name, header, rows)


def _cost_notes(result: dict[str, Any]) -> list[str]:
    work = result["workload"]
    lines = [
        f"{work['vision_tokens']} vision + {work['text_tokens']} text tokens, {work['new_tokens']} new tokens, "
        f"batch {work['batch']}, {work['dtype']}; two FLOPs a multiply-add, {result['convention']} convention, "
        f"counted by {result['counted_by']}."
    ]
    if published := result.get("published"):
        lines.append(
            f"Published for {published['model']}: {published['dense_tflops']} and {published['pmod_tflops']} TFLOPs."
        )
    return lines


def training(found: Found) -> Section:
    """Curves of all fine-tunings."""
    runs = [run for run in found.trainings if any("loss" in row for row in run.rows)]
    if not runs:
        return Section("Training")
    curves = list(zip(short_names([str(run.path.resolve()) for run in runs], found.names), runs, strict=True))
    rows = []
    for label, run in curves:
        steps = [row for row in run.rows if "loss" in row]
        speed = [row["samples_per_second"] for row in steps[1:] if "samples_per_second" in row]
        rows.append(
            [
                label + ("" if run.summary else " (not finished)"),
                str(run.summary["result"]["steps"] if run.summary else steps[-1]["step"]),
                f"{steps[0]['loss']:.4g}",
                f"{steps[-1]['loss']:.4g}",
                f"{sum(speed) / len(speed):.1f}" if speed else "-",
            ]
        )
    header = ["", "steps", "first loss", "last loss", "samples/s"]
    return Section("Training", [figures.training_figure(curves, _CURVES), Table("", header, rows)])


def environment(found: Found) -> Section:
    """Versions, and what was read."""
    versions: dict[str, str] = {}
    for profile in found.profiles:
        versions |= {
            name.replace("pmod-cli", "pmod"): v for name, v in profile.result["versions"].items() if v
        }
    for training_run in found.trainings:
        versions |= (training_run.summary or {}).get("versions") or {}
    for evaluation in found.evaluations:
        told = evaluation.result["environment"]
        versions |= {name: str(v) for name, v in told.items() if v and not isinstance(v, dict)}
    blocks: list[Block] = []
    if versions:
        blocks.append(Table("", ["package", "version"], [[name, v] for name, v in sorted(versions.items())]))
    if found.unread:
        blocks.append(Notes([f"not read: {path}: {reason}" for path, reason in found.unread.items()]))
    return Section("Environment", blocks)
