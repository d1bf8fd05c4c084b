"""The finished checkpoint, put in its place with its metrics, its recipe and a picture of the run."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from pmod_cli import __version__, plots
from pmod_cli.output.errors import first_line
from pmod_cli.output.files import copy_folder, remove_folder, replacing, tag, to_json
from pmod_cli.output.marks import is_ours
from pmod_cli.output.versions import versions
from pmod_cli.recipe import Recipe
from pmod_cli.training.monitor import read_metrics
from pmod_cli.training.trainer import writing

METRICS = "metrics.jsonl"
EVENTS = "runs"
"""Where TensorBoard's events are, named by transformers."""

_STATISTICS = (
    ("mean_weight", "mean router weight"),
    ("changed", "share of vision tokens kept before and skipped now, or the reverse"),
    ("entropy", "entropy over the image's positions"),
)
_log = logging.getLogger(__name__)


def save_result(
    network: Any,
    processor: Any,
    output: Path,
    work: Path,
    *,
    recipe: Recipe,
    summary: dict[str, Any],
    merge_lora: bool = False,
    force: bool = False,
) -> None:
    """Write the checkpoint beside its place, move it there, and remove the training folder ``work``.

    ``network`` is the trained model or the PEFT model around it, ``summary`` goes to ``training.json``.
    """
    if merge_lora:
        network = network.merge_and_unload()
    network.to(getattr(torch, recipe.train.dtype))
    hint = "the last checkpoint is kept: make room there and --resume"
    with writing(f"cannot write {output}", hint), replacing(output, force=force) as folder:
        folder.mkdir()
        network.save_pretrained(folder)
        _name_base(folder / "README.md", summary["model"])
        processor.save_pretrained(folder)
        shutil.copy(work / METRICS, folder / METRICS)
        if (work / EVENTS).is_dir():
            copy_folder(work / EVENTS, folder / EVENTS)
        made_with = {"pmod": __version__, **versions("torch", "transformers", "accelerate")}
        (folder / "training.json").write_bytes(to_json({**tag("finetune"), **summary, "versions": made_with}))
        text = yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True), sort_keys=False)
        (folder / "recipe.yaml").write_text(text)
        try:
            _draw(read_metrics(folder / METRICS), folder / "training.png")
        except OSError:
            raise
        except Exception as error:  # no matplotlib, or metrics that are not what they were
            _log.warning("no training.png: %s", first_line(error))
    if is_ours(work):
        remove_folder(work)
    else:
        _log.warning("%s holds files that pmod did not write, so it stays", work)


def _name_base(path: Path, name: str) -> None:
    """In the card that PEFT wrote, if there is one, call the base what others may know it by: it has the path."""
    if not path.is_file():
        return
    from huggingface_hub import ModelCard

    card, tag = ModelCard.load(path), "base_model:adapter:"
    card.data.base_model = name
    card.data.tags = [tag + name if each.startswith(tag) else each for each in card.data.tags or ()]
    card.save(path)


@plots.look()
def _draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss and learning rate by step and, of a p-MoD model, each router's statistics."""
    looks = [row for row in rows if "routers" in row]
    statistics = _STATISTICS if looks else ()
    count = 1 + len(statistics)
    figure, axes = plots.figure(count, 1, (7, 2.4 * count))
    axis, rows = axes[0][0], [row for row in rows if row.get("loss") is not None]
    steps = [row["step"] for row in rows]
    axis.plot(steps, [row["loss"] for row in rows], color=plots.PMOD if looks else plots.DENSE)
    axis.set(title="loss (line) and learning rate (dashed)", xlabel="step", ylabel="loss")
    axis.set_ylim(bottom=0)
    rates = axis.twinx()
    style: dict[str, Any] = {"color": plots.SERIES[1], "linewidth": 1, "linestyle": "--"}
    rates.plot(steps, [row.get("learning_rate") for row in rows], **style)
    rates.set_ylabel("learning rate")
    rates.set_ylim(bottom=0)
    for row, (name, title) in zip(axes[1:], statistics, strict=True):
        _draw_routers(figure, row[0], looks, name, title)
    path.write_bytes(plots.render(figure, path.suffix, title="training"))


def _draw_routers(figure: Any, axis: Any, looks: list[dict[str, Any]], name: str, title: str) -> None:
    """A colour for each layer and look: rows are layers, columns are looks."""
    layers = [row["layer"] for row in looks[0]["routers"]]
    values = np.array([[row[name] for row in look["routers"]] for look in looks], dtype=float)  # None is NaN
    image = axis.imshow(values.T, aspect="auto", origin="lower", cmap=plots.HEAT, interpolation="nearest")
    axis.set(title=title, xlabel="step", ylabel="decoder layer")
    axis.grid(False)
    every = max(1, len(looks) // 8)
    axis.set_xticks(range(0, len(looks), every), [look["step"] for look in looks[::every]])
    every = max(1, len(layers) // 8)
    axis.set_yticks(range(0, len(layers), every), layers[::every])
    figure.colorbar(image, ax=axis)
