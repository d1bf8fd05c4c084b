"""What a run shows and writes while it goes: progress on stderr, ``metrics.jsonl``, router statistics."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from pmod_cli.training.probe import router_statistics

ProgressCallback = Callable[[int, int, dict[str, float]], None]
"""Called after each step with the steps done, the steps in all, and what was last logged."""

_LOGGED = ("loss", "grad_norm", "learning_rate", "samples_per_second", "tokens_per_second", "memory_bytes")


class Monitor(TrainerCallback):
    """Writes ``metrics.jsonl``, tells the progress callback, and has the routers' statistics logged.

    A resumed run first drops what was written after the checkpoint it goes on from.

    Args:
        path: The file.
        progress: Or None.
        probe: Batches on which the routers are watched; empty on a process that takes no part in it.
        every: Steps between two looks at the routers.
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
            kept = [line for line in read_metrics(self.path) if line["step"] <= state.global_step]
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
            temporary.replace(self.path)
        # What later looks are compared with: the routers as they start, or as the checkpoint has them.
        if self.probe:
            self._look(args, state, control, write=state.global_step == 0)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        """Write what the Trainer logs."""
        if not state.is_world_process_zero or "loss" not in logs:
            return
        row = {key: float(logs[key]) for key in _LOGGED if key in logs}
        self.latest = row
        finite = {key: value if math.isfinite(value) else None for key, value in row.items()}
        self._write({"step": state.global_step, "epoch": state.epoch, **finite})

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
        self._write({"step": state.global_step, "routers": statistics})
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
