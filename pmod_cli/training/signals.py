"""SIGTERM, as a cluster sends it before it takes a machine back: save and stop."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

import torch
from transformers import TrainerCallback

from pmod_cli.output.errors import PmodError


class Preempted(PmodError):
    """SIGTERM came; a checkpoint was saved. Exit code 143, as the shell has it for SIGTERM."""

    exit_code = 143


class StopAtSignal(TrainerCallback):
    """At SIGTERM to any process, all finish the step, save and stop."""

    def __init__(self) -> None:
        self.asked = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signal while the body runs."""

        def ask(number: int, frame: Any) -> None:
            self.asked = True

        try:
            before = signal.signal(signal.SIGTERM, ask)
        except ValueError:  # not the main thread: whoever started it gets the signals
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer after each optimizer step."""
        if args.world_size > 1:
            # The signal reaches the processes in different steps; one that stopped alone would leave the others
            # waiting for it.
            asked = torch.tensor(int(self.asked), device=args.device)
            torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
            self.asked = bool(asked)
        if self.asked:
            control.should_save = control.should_training_stop = True
