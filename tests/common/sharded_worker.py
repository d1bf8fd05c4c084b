"""``pmod`` where accelerate shards on the CPU too; run by ``accelerate launch`` from `test_sharded`.

Two refusals are lifted, in this process alone: accelerate takes its FSDP branch on GPUs only (a list of back ends
without ``MULTI_CPU``), and `pmod finetune` therefore refuses to start. Everything else is what runs on GPUs.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any
from unittest.mock import patch

from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from pmod_cli.cli import main
from pmod_cli.training import finetune, preflight
from pmod_cli.training.trainer import PmodTrainer

choose = AcceleratorState.__init__
arguments = preflight.training_arguments


def choose_among_more(self: Any, mixed_precision: Any = None, cpu: bool = False, **kwargs: Any) -> None:
    """While accelerate chooses how to distribute, gloo's processes pass for processes with GPUs."""
    shared = PartialState(cpu)._shared_state
    if shared["distributed_type"] == DistributedType.MULTI_CPU:
        shared["distributed_type"] = DistributedType.MULTI_GPU
    choose(self, mixed_precision, cpu, **kwargs)


def arguments_without_refusal(*args: Any) -> Any:
    """The Trainer's arguments as for a run that is not sharded."""
    with patch.object(preflight, "sharding", return_value=None):
        return arguments(*args)


class WatchedTrainer(PmodTrainer):
    """Kills its process after the step ``PMOD_KILL``; says in ``PMOD_OUT`` what was sharded."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if str(self.state.global_step) == os.environ.get("PMOD_KILL"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(*args, **kwargs)

    def whole_network(self) -> Any:
        parts = [part for part in self.model_wrapped.modules() if isinstance(part, FSDPModule)]
        classes = {type(part).__name__ for part in (self.model_wrapped, *parts)}
        path = Path(os.environ["PMOD_OUT"]) / f"shards-{self.args.process_index}.json"
        path.write_text(json.dumps(sorted(classes)))
        return super().whole_network()


if __name__ == "__main__":
    with (
        patch.object(AcceleratorState, "__init__", choose_among_more),
        patch.object(preflight, "training_arguments", arguments_without_refusal),
        patch.object(finetune, "PmodTrainer", WatchedTrainer),
    ):
        main()
