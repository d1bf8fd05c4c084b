"""What a run writes and shows while it goes: ``metrics.jsonl``, router statistics, bad samples, progress."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from pmod_cli.data.batches import Collator, EncodedDataset
from pmod_cli.data.table import Shapes
from pmod_cli.modeling.names import is_router
from pmod_cli.output.errors import GateError
from pmod_cli.output.files import write_file
from pmod_cli.output.reading import read_json_lines
from pmod_cli.training.memory import gib

ProgressCallback = Callable[[int, int, dict[str, float]], None]
"""Called after each step with the steps done, the steps in all, and what was last logged."""

PROBE_SAMPLES = 8
"""Samples with images on which the routers are watched."""

_LOGGED: dict[str, Callable[[float], str]] = {
    "loss": "loss {:.4f}".format,
    "grad_norm": "grad {:.2f}".format,
    "learning_rate": "lr {:.2e}".format,
    "samples_per_second": "samples/s {:.1f}".format,
    "tokens_per_second": "tokens/s {:.0f}".format,
    "memory_bytes": gib,
}
"""What ``metrics.jsonl`` holds of what the Trainer logs, and how the progress bar shows it."""

_log = logging.getLogger(__name__)


class Monitor(TrainerCallback):
    """Writes ``metrics.jsonl``, calls the progress callback, and logs router statistics.

    A resumed run first drops what was written after the checkpoint it goes on from. The routers are watched on the
    batches of ``probe``, ``every`` so many steps; a process that takes no part in it has none.
    """

    def __init__(
        self, path: Path, progress: ProgressCallback | None, probe: list[dict[str, Any]], every: int
    ) -> None:
        self.path, self.progress, self.probe, self.every = path, progress, probe, every
        self.trainer: Any = None  # set once there is one
        self.kept: dict[int, Tensor] = {}
        self.latest: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the file, or cut it at the checkpoint."""
        if state.is_world_process_zero:
            kept = [row for row in read_metrics(self.path) if row["step"] <= state.global_step]
            write_file(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        # Later looks are compared with this one: the routers as they start, or as the checkpoint has them.
        if self.probe:
            self._look(args, state, control, write=state.global_step == 0)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        """Write what the Trainer logs."""
        if not state.is_world_process_zero or "loss" not in logs:
            return
        self.latest = {key: float(logs[key]) for key in _LOGGED if key in logs}
        finite = {key: value if math.isfinite(value) else None for key, value in self.latest.items()}
        _append(self.path, {"step": state.global_step, "epoch": state.epoch, **finite})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report progress; look at the routers now and then."""
        due = state.global_step % self.every == 0 or state.global_step == state.max_steps
        if self.probe and due:
            self._look(args, state, control)
        if self.progress is not None and state.is_world_process_zero:
            self.progress(state.global_step, state.max_steps, self.latest)

    def _look(self, args: Any, state: Any, control: Any, *, write: bool = True) -> None:
        statistics, self.kept = router_statistics(self.trainer.model, self.probe, self.kept)
        if not (write and state.is_world_process_zero):
            return
        _append(self.path, {"step": state.global_step, "routers": statistics})
        figures = {
            f"routers/layer_{row['layer']:02d}/{name}": value
            for row in statistics
            for name, value in row.items()
            if name != "layer" and value is not None
        }
        # To TensorBoard or W&B. The handler takes it for the step's own log, which is still to come.
        should_log = control.should_log
        self.trainer.callback_handler.on_log(args, state, control, figures)
        control.should_log = should_log


def progress_text(latest: dict[str, float]) -> str:
    """What was last logged, for a progress bar: ``loss 1.2345  grad 0.50  ...``."""
    return "  ".join(show(latest[key]) for key, show in _LOGGED.items() if key in latest)


class BadSampleLog:
    """The samples that turned out to be bad, of all processes: each appends to one file and reads the others' lines.

    A resumed run goes on with the file. More bad samples than ``limit`` stop the run; those ``known`` from the start
    (id -> reason) count too.
    """

    def __init__(self, path: Path, limit: int, known: dict[str, str]) -> None:
        self.path, self.limit = path, limit
        self.samples = dict(known)

    def add(self, replaced: Iterable[tuple[str, str]]) -> None:
        """Count samples that were replaced: (id, reason) each; `GateError` if there are now more than the limit."""
        samples = self.all()
        for name, reason in replaced:
            if name not in samples:
                samples[name] = reason
                _log.warning("sample %s replaced: %s", name, reason)
                _append(self.path, [name, reason])
        if len(samples) > self.limit:
            name, reason = next(reversed(samples.items()))
            raise GateError(
                f"{len(samples)} bad samples, more than train.max_bad_samples={self.limit}; "
                f"the last: {name}: {reason}",
                "clean the data with pmod data check --fix, or raise the limit and go on with --resume",
            )

    def all(self) -> dict[str, str]:
        """Id -> reason, those of other processes included."""
        for entry in read_json_lines(self.path):
            if isinstance(entry, list) and len(entry) == 2:
                self.samples.setdefault(str(entry[0]), str(entry[1]))
        return self.samples


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl``; what is none is left out."""
    return [row for row in read_json_lines(path) if isinstance(row, dict) and type(row.get("step")) is int]


def make_probe(
    model: nn.Module, dataset: EncodedDataset, collator: Collator, size: int
) -> list[dict[str, Any]]:
    """Batches of ``size`` fixed samples with images, `PROBE_SAMPLES` in all; none for a dense model."""
    if not any(is_router(name) for name, _ in model.named_parameters()):
        return []
    chosen = np.flatnonzero(Shapes.of(dataset.samples).images)[:PROBE_SAMPLES].tolist()
    batches = []
    for start in range(0, len(chosen), size):
        batch = collator([dataset[index] for index in chosen[start : start + size]])
        batches.append({key: value for key, value in batch.items() if key not in ("labels", "notes")})
    return batches


@torch.no_grad()
def router_statistics(
    model: Any, probe: list[dict[str, Any]], previous: dict[int, Tensor]
) -> tuple[list[dict[str, Any]], dict[int, Tensor]]:
    """What each router does on the batches of `make_probe`.

    Returns:
        One row per Mixture-of-Depths layer: ``layer``, ``mean_weight`` of the vision tokens, ``changed`` (share
        of the vision tokens that are now kept and were skipped in the ``previous`` masks, or the reverse; None at the
        first look) and ``entropy`` (of the kept share over the image's positions: 1 where all positions are kept alike,
        0 where a single one is); and the kept masks by layer.
    """
    was_training = model.training
    model.eval()
    kept: dict[int, list[Tensor]] = {}
    weights: dict[int, list[Tensor]] = {}
    for batch in probe:
        inputs = {key: value.to(model.device) for key, value in batch.items() if isinstance(value, Tensor)}
        vision = inputs["input_ids"] == model.config.image_token_id
        output = model(**inputs, logits_to_keep=1, use_cache=False, output_routing=True)
        for index, layer in enumerate(output.routing):
            if layer is not None:
                rows = [mask[image] for mask, image in zip(layer.kept, vision, strict=True) if image.any()]
                kept.setdefault(index, []).extend(rows)
                weights.setdefault(index, []).append(layer.weights[vision].float())
    model.train(was_training)
    masks = {index: torch.cat(rows) for index, rows in kept.items()}
    statistics = [
        {
            "layer": index,
            "mean_weight": float(torch.cat(weights[index]).mean()),
            "changed": float((mask != previous[index]).float().mean()) if index in previous else None,
            "entropy": _entropy(kept[index]),
        }
        for index, mask in masks.items()
    ]
    return statistics, masks


def _entropy(rows: list[Tensor]) -> float:
    """Normalised entropy of how often each position is kept, over the positions that all images have."""
    length = min(map(len, rows))
    share = torch.stack([row[:length].float() for row in rows]).mean(0)
    if length < 2 or not share.sum():
        return 0.0
    share = share / share.sum()
    return float(torch.special.entr(share).sum() / math.log(length))


def _append(path: Path, row: Any) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
