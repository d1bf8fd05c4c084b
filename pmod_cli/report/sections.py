"""What stands in a report, section by section; a section without contents is left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pmod_cli.evaluation.paper import JUDGED, PUBLISHED, TABLES, average
from pmod_cli.modeling.schedule import mean_retention
from pmod_cli.profiling.explain import size
from pmod_cli.profiling.published import published_family
from pmod_cli.report import figures
from pmod_cli.report.collect import Found, Profile
from pmod_cli.report.document import Block, Figure, Link, Notes, Section, Table, Text, Tiles, relative
from pmod_cli.report.examples import changes
from pmod_cli.report.models import Model, compare

_NORMAL = 1.96
_EXAMPLES = 8
_PREFIXES = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))
_PAPER_TASKS = {task: title for columns in TABLES for title, task in columns.items()} | {JUDGED: "MMB"}


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
                tiles.append((_change(ratios[key]), what, f"{why}, p-MoD against dense"))
        retention = (profile.result.get("pmod") or {}).get("retention", {}).get("vision")
        if retention is not None:
            tiles.append((_share(retention), "of the vision tokens", "kept by a layer, on average"))
    if tuned and other:
        for task in (task for task in tuned.scores if task in other.scores):
            gap = compare(tuned, other, task)
            if gap is not None:
                scores = f"{tuned.scores[task]['value']:.1f} against {other.scores[task]['value']:.1f}"
                inside = f"95 % interval {_signed(gap.low)} to {_signed(gap.high)}"
                what = f"points on {task}"
                tiles.append(
                    (_signed(gap.points), what, f"{scores}, {tuned.label} against {other.label}; {inside}")
                )
                break
    return Section("Summary", [Tiles(tiles)] if tiles else [])


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
        routed = sum(ratio is not None for ratio in ratios)
        blocks.append(
            figures.retention_figure(
                ratios,
                f"Retention ratio by layer of {path.name}: {routed} of {len(ratios)} layers route, "
                f"mean {_share(mean_retention(ratios))}; grey layers are dense.",
            )
        )
    rows, columns = _settings(found)
    if columns:
        blocks.append(Table("", ["", *columns], rows))
    return Section("Recipe", blocks)


def _settings(found: Found) -> tuple[list[list[str]], list[str]]:
    """Settings of all trainings side by side; those that are the recipe's default everywhere are left out."""
    from pmod_cli.recipe import ModSettings, TrainSettings

    runs = [training for training in found.trainings if training.summary]
    columns = [training.path.name for training in runs]
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
            values = [summary["recipe"].get(section, {}).get(key, default) for summary in summaries]
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
        blocks += [_cost_table(profile), Notes(_cost_notes(profile.result))]
    return Section("Cost", blocks)


def _cost_table(profile: Profile) -> Table:
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
        rows.append([label, *map(show, values), *([_share(values[1] / values[0])] if both else [])])

    add("prefill", lambda r: sides[r]["prefill"]["flops"], _flops, "FLOPs")
    add("one decode step", lambda r: sides[r]["decode_step"]["flops"], _flops)
    add("prefill and all new tokens", lambda r: sides[r]["generation"]["flops"], _flops)
    add("after prefill", lambda r: sides[r]["kv_cache"]["prefill_bytes"], size, "KV cache")
    add("with all new tokens", lambda r: sides[r]["kv_cache"]["final_bytes"], size)
    add("vision tokens", lambda r: sides[r]["retention"]["vision"], _share, "kept by a layer, on average")
    add("all tokens", lambda r: sides[r]["retention"]["all"], _share)
    add("parameters", lambda r: sides[r]["parameters"]["total"], lambda v: f"{v:,.0f}", "model")
    measured = f"measured on {(result.get('latency') or {}).get('device')}"
    for phase, label in (
        ("prefill", "prefill (first token)"),
        ("decode", "decode (all further tokens)"),
        ("end_to_end", "end to end"),
    ):
        add(label, lambda r, p=phase: latency[r]["seconds"][p]["median"], _milliseconds, measured)  # type: ignore[misc]
    add("KV cache, real bytes", lambda r: latency[r]["kv_cache"]["prefill_bytes"], size, measured)
    add("peak device memory", lambda r: latency[r]["peak_memory_bytes"], size, measured)
    names = {"dense": "dense", "pmod": "p-MoD"}
    header = ["", *(names[role] for role in sides), *(["p-MoD / dense"] if len(sides) == 2 else [])]
    return Table(f"{Path(str(result['model'])).name}", header, rows)


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


def accuracy(models: Sequence[Model], other: Model | None) -> Section:
    """Scores with intervals, and differences to the dense model."""
    tasks = list(dict.fromkeys(task for model in models for task in model.scores))
    if not tasks:
        return Section("Accuracy")
    rows = []
    for task in tasks:
        rows.append([task, *(_score(model.scores.get(task)) for model in models)])
        rows += _kinds(models, task)
    if len(tasks) > 1 and all(task in model.scores for task in tasks for model in models):
        rows.append(["mean", *(_number(mean_accuracy(model, tasks)) for model in models)])
    table = Table("Scores in points", ["", *(model.label for model in models)], rows)
    notes = ["± is half the 95 % interval (1.96 bootstrap standard errors over the samples)."]
    blocks: list[Block] = [table]
    compared = [model for model in models if model is not other] if other else []
    gaps = []
    for task in tasks:
        cells = []
        for model in compared:
            assert other is not None
            both = task in model.scores and task in other.scores
            gap = compare(model, other, task) if both else None
            star = " *" if gap and gap.significant else ""
            cells.append(
                f"{_signed(gap.points)} ({_signed(gap.low)} to {_signed(gap.high)}){star}" if gap else "-"
            )
        if any(cell != "-" for cell in cells):
            gaps.append([task, *cells])
    if gaps and other:
        blocks.append(
            Table(f"Difference to {other.label}, in points", ["", *(m.label for m in compared)], gaps)
        )
        notes.append("95 % interval of a paired bootstrap over the samples; * where it leaves out 0.")
    return Section("Accuracy", [*blocks, Notes(notes)])


def accuracy_and_flops(models: Sequence[Model]) -> Section:
    """One point a model, the published ones beside them."""
    costed = [model for model in models if model.flops and model.scores]
    shared = [task for task in (costed[0].scores if costed else ()) if all(task in m.scores for m in costed)]
    shared = [task for task in shared if all(m.scores[task]["value"] is not None for m in costed)]
    if not shared:
        missing = (
            "No model has both a score and a profile: run pmod profile with --json into the same folder."
        )
        return Section("Accuracy against FLOPs", [Text(missing)] if models else [])
    ours = [
        figures.Point(
            model.label,
            model.flops or 0,
            mean_accuracy(model, shared),
            _half_width(model, shared),
            model.is_pmod,
        )
        for model in costed
    ]
    together = all(task in _PAPER_TASKS for task in shared)
    family = costed[0].family
    theirs = _published(family, shared if together else None)
    what = f"{shared[0]}, points" if len(shared) == 1 else f"mean of {len(shared)} tasks, points"
    caption = f"Accuracy ({', '.join(shared)}) over the prefill FLOPs of one sample; bars are 95 % intervals."
    if theirs and together:
        caption += " Hollow: the paper's 7B models on the same tasks, FLOPs as the paper counts them."
    elif theirs:
        caption += " Beside it the paper's 7B models, on their 14 tasks."
    return Section(
        "Accuracy against FLOPs",
        [figures.accuracy_figure(ours, theirs, together=together, what=what, caption=caption)],
    )


def _published(family: str, tasks: Sequence[str] | None) -> list[figures.Point]:
    """The paper's dense and p-MoD model of a family, on some of its tasks or on all."""
    flops = published_family(family)
    if flops is None or family not in PUBLISHED:
        return []
    points = []
    for role, tera, name in (
        ("baseline", flops.dense_tflops, flops.model),
        ("model", flops.pmod_tflops, f"p-MoD-{flops.model}"),
    ):
        values: dict[str, float | None] = dict(PUBLISHED[family][role])
        if tasks is not None:
            values = {_PAPER_TASKS[task]: values[_PAPER_TASKS[task]] for task in tasks}
        mean = average(values)
        assert mean is not None
        points.append(figures.Point(f"{name} (paper)", tera * 1e12, mean, None, role == "model"))
    return points


def mean_accuracy(model: Model, tasks: Sequence[str]) -> float:
    """Mean over tasks, MME taken out of 100 instead of 2000; NaN if a score is missing."""
    values = [model.scores[task]["value"] for task in tasks]
    if any(value is None for value in values):
        return float("nan")
    shares = [value / 20 if task == "mme" else value for task, value in zip(tasks, values, strict=True)]
    return sum(shares) / len(shares)


def training(found: Found) -> Section:
    """Curves of all fine-tunings."""
    curves = [(run.path.name, run) for run in found.trainings if any("loss" in row for row in run.rows)]
    if not curves:
        return Section("Training")
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
    return Section(
        "Training", [figures.training_figure(curves, "As logged during training."), Table("", header, rows)]
    )


def differences(models: Sequence[Model], other: Model | None) -> Section:
    """Samples that a p-MoD model and the dense one scored differently, with pictures."""
    blocks: list[Block] = []
    for model in models:
        if other is None or not model.is_pmod:
            continue
        tasks = [task for task in model.samples if task in other.samples]
        found = changes(model, other, tasks, _EXAMPLES)
        if found.compared:
            blocks.append(
                Text(
                    f"{model.label} against {other.label}: of {found.compared} samples {found.better} became right or "
                    f"better, {found.worse} wrong or worse."
                )
            )
            blocks += found.shown
    return Section("Samples that differ", blocks)


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


def _score(score: dict[str, Any] | None) -> str:
    if score is None:
        return "-"
    if score["value"] is None:
        return f"{score['failed']} failed" if score.get("failed") else "none"
    error = score.get("stderr")
    return f"{score['value']:.1f}" + (f" ± {_NORMAL * error:.1f}" if error is not None else "")


def _half_width(model: Model, tasks: Sequence[str]) -> float | None:
    """Of the mean's 95 % interval, tasks being independent."""
    squares = 0.0
    for task in tasks:
        error = model.scores[task].get("stderr")
        if error is None:
            return None
        squares += (error / 20 if task == "mme" else error) ** 2
    return _NORMAL * squares**0.5 / len(tasks)


def _kinds(models: Sequence[Model], task: str) -> list[list[str]]:
    """Rows of a task's kinds of question, where it tells them apart (exact match by kind)."""
    found: dict[str, dict[int, float]] = {}
    for place, model in enumerate(models):
        score = model.scores.get(task)
        if score is None or len(score["tasks"]) != 1:
            continue
        metrics = score["metrics"][score["tasks"][0]]
        if "exact_match,none" not in metrics:
            continue
        for key, value in metrics.items():
            if key != "exact_match,none":
                found.setdefault(key.removesuffix(",none"), {})[place] = value * score["scale"]
    return [
        [f"– {kind}", *(f"{values[place]:.1f}" if place in values else "-" for place in range(len(models)))]
        for kind, values in found.items()
    ]


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")


def _change(ratio: float) -> str:
    return f"{_signed(100 * (ratio - 1))} %"


def _number(value: float) -> str:
    return "-" if value != value else f"{value:.1f}"


def _flops(value: float) -> str:
    unit, factor = next((pair for pair in _PREFIXES if value >= pair[1]), ("", 1.0))
    return f"{value / factor:#.4g} {unit}"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _milliseconds(value: float) -> str:
    return f"{1e3 * value:.1f} ms"
