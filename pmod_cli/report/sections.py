"""Summary, pictures, recipe, cost, training and environment; a section without contents is left out."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from pmod_cli.modeling.schedule import mean_retention
from pmod_cli.output.tables import Table
from pmod_cli.output.units import milliseconds, share, si, signed, size
from pmod_cli.profiling.render import Line, cost_table
from pmod_cli.recipe import ModSettings, TrainSettings
from pmod_cli.report import figures
from pmod_cli.report.collect import Found
from pmod_cli.report.document import Block, Figure, Notes, Section, Text, Tiles
from pmod_cli.report.models import Model, compare, main_profile, short_names

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
    if profile := main_profile(found):
        ratios = profile["ratios"]
        for key, what, why in (
            ("prefill_flops", "prefill FLOPs", "work before the first token"),
            ("kv_prefill", "KV cache", "memory that each sequence holds"),
            ("prefill_seconds", "prefill time", "measured"),
        ):
            if key in ratios:
                tiles.append((f"{signed(100 * (ratios[key] - 1))} %", what, f"{why}, p-MoD against dense"))
        retention = (profile.get("pmod") or {}).get("retention", {}).get("vision")
        if retention is not None:
            tiles.append((share(retention), "of the vision tokens", "kept by a layer, on average"))
    if tuned and other:
        for task in tuned.scores:
            gap = compare(tuned, other, task) if task in other.scores else None
            if gap is not None:
                scores = f"{tuned.scores[task]['value']:.1f} against {other.scores[task]['value']:.1f}"
                inside = f"95 % interval {signed(gap.low)} to {signed(gap.high)}"
                why = f"{scores}, {tuned.label} against {other.label}; {inside}"
                tiles.append((signed(gap.points), f"points on {task}", why))
                break
    return Section("Summary", [Text(_WHAT), Tiles(tiles)] if tiles else [])


def pictures(found: Found, folder: Path) -> Section:
    """What pmod drew, and the pages that lie beside the report."""
    blocks: list[Block] = []
    for path in found.pictures:
        with Image.open(path) as image:
            title = image.info.get("Title") or path.stem.replace("_", " ")
        blocks.append(Figure(path.stem, title, path.read_bytes()))
    for page in found.pages:
        target = Path(os.path.relpath(page, folder)).as_posix()
        blocks.append(Text("Layer by layer: the page with a slider", target))
    if blocks:
        skipped = "Grey patches were skipped by a layer; their tokens pass it unchanged but for a weight."
        blocks.insert(0, Text(skipped))
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
        caption = (
            f"Retention ratio by layer of {name}: {routed} of {len(ratios)} layers route, "
            f"mean {share(mean_retention(ratios))}; grey layers are dense."
        )
        if source := conversion.get("source"):
            by = conversion.get("recipe")
            caption += f" Converted from {source}" + (f" by the recipe {by['name']}." if by else ".")
        blocks.append(figures.retention_figure(ratios, caption))
    runs = [training for training in found.trainings if training.summary]
    if runs:
        header = ["", *short_names([str(run.path.resolve()) for run in runs], found.names)]
        blocks.append(Table("", header, _settings([run.summary for run in runs])))
    return Section("Recipe", blocks)


_TRAINING: dict[str, Callable[[dict[str, Any]], Any]] = {
    "recipe": lambda s: s["recipe"]["name"],
    "start": lambda s: Path(s["model"]).name,
    "steps": lambda s: s["result"]["steps"],
    "samples": lambda s: s["result"]["samples"],
    "wall time": lambda s: f"{s['result']['seconds']:.0f} s",
    "trained parameters": lambda s: f"{sum(p['trained'] for p in s['result']['parts']):,}",
    "processes": lambda s: s["processes"],
}


def _settings(summaries: list[dict[str, Any]]) -> list[list[str]]:
    """Settings of all trainings side by side; those that are the recipe's default everywhere are left out."""

    def cell(read: Callable[[dict[str, Any]], Any], summary: dict[str, Any]) -> str:
        try:
            return str(read(summary))
        except (KeyError, TypeError):
            return "-"

    rows = [[label, *(cell(read, summary) for summary in summaries)] for label, read in _TRAINING.items()]
    for section, defaults in (("mod", ModSettings()), ("train", TrainSettings())):
        chosen = []
        for key, default in defaults.model_dump(mode="json").items():
            values = [summary.get("recipe", {}).get(section, {}).get(key, default) for summary in summaries]
            if any(value != default for value in values) or key in ("schedule", "learning_rate"):
                chosen.append([f"{section}.{key}", *("-" if v is None else str(v) for v in values)])
        rows += [[f"{section}, where it is not the default"], *chosen] if chosen else []
    return rows


def cost(found: Found) -> Section:
    """What was counted and measured."""
    blocks: list[Block] = []
    for profile in found.profiles:
        lines: list[Line] = [
            ("FLOPs",),
            ("prefill", "prefill.flops", si),
            ("one decode step", "decode_step.flops", si),
            ("prefill and all new tokens", "generation.flops", si),
            ("KV cache",),
            ("after prefill", "kv_cache.prefill_bytes", size),
            ("with all new tokens", "kv_cache.final_bytes", size),
            ("kept by a layer, on average",),
            ("vision tokens", "retention.vision", share),
            ("all tokens", "retention.all", share),
            ("model",),
            ("parameters", "parameters.total", lambda count: f"{count:,}"),
            (f"measured on {(profile.get('latency') or {}).get('device')}",),
            ("prefill (first token)", "latency.seconds.prefill.median", milliseconds),
            ("decode (all further tokens)", "latency.seconds.decode.median", milliseconds),
            ("end to end", "latency.seconds.end_to_end.median", milliseconds),
            ("KV cache, real bytes", "latency.kv_cache.prefill_bytes", size),
            ("peak device memory", "latency.peak_memory_bytes", size),
        ]
        model, work = str(profile["model"]), profile["workload"]
        title = found.names.get(model) or Path(model).name
        notes = [
            f"{work['vision_tokens']} vision + {work['text_tokens']} text tokens, {work['new_tokens']} new tokens, "
            f"batch {work['batch']}, {work['dtype']}; two FLOPs per multiply-add, {profile['convention']} convention, "
            f"counted by {profile['counted_by']}."
        ]
        if paper := profile.get("published"):
            figures_of = f"{paper['dense_tflops']} and {paper['pmod_tflops']} TFLOPs"
            notes.append(f"Published for {paper['model']}: {figures_of}.")
        blocks += [cost_table(title, profile, lines, "p-MoD / dense", share), Notes(notes)]
    return Section("Cost", blocks)


def training(found: Found) -> Section:
    """Curves of all fine-tunings."""
    runs = [run for run in found.trainings if any("loss" in row for row in run.rows)]
    if not runs:
        return Section("Training")
    labels = short_names([str(run.path.resolve()) for run in runs], found.names)
    rows = []
    for label, run in zip(labels, runs, strict=True):
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
    drawn = figures.training_figure(list(zip(labels, runs, strict=True)), _CURVES)
    header = ["", "steps", "first loss", "last loss", "samples/s"]
    return Section("Training", [drawn, Table("", header, rows)])


def environment(found: Found) -> Section:
    """Versions, and what was read."""
    environments = [profile["versions"] for profile in found.profiles]
    environments += [run.summary.get("versions") or {} for run in found.trainings]
    environments += [evaluation.result["environment"] for evaluation in found.evaluations]
    versions = {
        name.replace("pmod-cli", "pmod"): str(value)
        for each in environments
        for name, value in each.items()
        if value and not isinstance(value, dict)
    }
    blocks: list[Block] = []
    if versions:
        blocks.append(Table("", ["package", "version"], [list(row) for row in sorted(versions.items())]))
    if found.unread:
        blocks.append(Notes([f"not read: {path}: {reason}" for path, reason in found.unread.items()]))
    return Section("Environment", blocks)
