"""What a run shows and writes while it goes: progress on stderr, ``metrics.jsonl``, router statistics."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

ProgressCallback = Callable[[int, int, dict[str, float]], None]
"""Called after each step with the steps done, the steps in all, and what was last logged."""


class Monitor(TrainerCallback):
    """Writes ``metrics.jsonl`` and tells the progress callback.

    A resumed run first drops what was written after the checkpoint it goes on from.

    Args:
        path: The file.
        progress: Or None.
        probe: A batch on which the routers are watched, or None.
        every: Steps between two looks at the routers.
    """

    def __init__(
        self, path: Path, progress: ProgressCallback | None, probe: dict[str, Any] | None, every: int
    ) -> None:
        self.path, self.progress, self.probe, self.every = path, progress, probe, every
        self.trainer: Any = None  # set once there is one
        self.kept: dict[int, Tensor] = {}
        self.latest: dict[str, float] = {}
        self._seen = (time.perf_counter(), 0, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the file, or cut it at the checkpoint."""
        if state.is_world_process_zero:
            kept = [line for line in read_metrics(self.path) if line["step"] <= state.global_step]
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
            temporary.replace(self.path)
        self._seen = (time.perf_counter(), 0, 0)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        """Add speed and memory to what the Trainer logs, and write it."""
        if not state.is_world_process_zero or "loss" not in logs:
            return
        now, samples, tokens = time.perf_counter(), self.trainer.samples, self.trainer.tokens
        seconds = max(now - self._seen[0], 1e-9)
        row: dict[str, float] = {
            key: float(logs[key]) for key in ("loss", "grad_norm", "learning_rate") if key in logs
        }
        row["samples_per_second"] = (samples - self._seen[1]) * args.world_size / seconds
        row["tokens_per_second"] = (tokens - self._seen[2]) * args.world_size / seconds
        if torch.cuda.is_available():
            row["memory_bytes"] = float(torch.cuda.max_memory_allocated())
        self._seen = (now, samples, tokens)
        self.latest = row
        self._write({"step": state.global_step, "epoch": state.epoch, **row})

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Report progress; look at the routers now and then."""
        if not state.is_world_process_zero:
            return
        due = state.global_step % self.every == 0 or state.global_step == state.max_steps
        if self.probe is not None and due and model is not None and args.world_size == 1:
            statistics, self.kept = router_statistics(model, self.probe, self.kept)
            self._write({"step": state.global_step, "routers": statistics})
        if self.progress is not None:
            self.progress(state.global_step, state.max_steps, self.latest)

    def _write(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; a last line that was cut off is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


@torch.no_grad()
def router_statistics(
    model: Any, probe: dict[str, Any], previous: dict[int, Tensor]
) -> tuple[list[dict[str, float]], dict[int, Tensor]]:
    """What each router does on a fixed batch.

    Args:
        model: A p-MoD model.
        probe: The model's inputs.
        previous: Kept masks of the look before, by layer; empty at first.

    Returns:
        One row a Mixture-of-Depths layer: ``layer``, ``mean_weight`` of the vision tokens, ``changed`` (share
        of the vision tokens whose fate differs from the look before) and ``entropy`` (of the kept share over
        the image's positions, averaged over the samples: 1 where all positions are kept alike, 0 where one
        alone is); and the kept masks.
    """
    was_training = model.training
    model.eval()
    inputs = {key: value.to(next(model.parameters()).device) for key, value in probe.items()}
    vision = inputs["input_ids"] == model.config.image_token_id
    routing = model(**inputs, use_cache=False, output_routing=True).routing
    model.train(was_training)
    rows: list[dict[str, float]] = []
    masks: dict[int, Tensor] = {}
    for index, layer in enumerate(routing):
        if layer is None or not vision.any():
            continue
        kept = layer.kept[vision]
        masks[index] = kept
        changed = float((kept != previous[index]).float().mean()) if index in previous else 0.0
        rows.append(
            {
                "layer": index,
                "mean_weight": float(layer.weights[vision].float().mean()),
                "changed": changed,
                "entropy": _entropy(layer.kept, vision),
            }
        )
    return rows, masks


def _entropy(kept: Tensor, vision: Tensor) -> float:
    """Normalised entropy of how often each place of the image is kept."""
    rows = [k[v].float() for k, v in zip(kept, vision, strict=True) if v.any()]
    length = min(map(len, rows))
    share = torch.stack([row[:length] for row in rows]).mean(0)
    if length < 2 or not share.sum():
        return 0.0
    share = share / share.sum()
    return float(torch.special.entr(share).sum() / torch.tensor(float(length)).log())
