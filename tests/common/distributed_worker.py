"""Trains a tiny p-MoD model for a few steps, in two processes or alone (run by test_training)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from tests.common.tiny import IMAGE, pictures, prompt, tiny_model

STEPS = 3


def sample(rank: int, step: int) -> dict[str, Any]:
    """Rank 0 sees an image, rank 1 only text."""
    ids = torch.tensor([prompt(1 - rank, 8, seed=10 * step + rank)])
    inputs: dict[str, Any] = {"input_ids": ids, "labels": ids.masked_fill(ids == IMAGE, -100)}
    if rank == 0:
        inputs["pixel_values"] = pictures(1, seed=step)
    return inputs


def frozen_tower_model() -> Any:
    """As fine-tuning has it: the vision tower does not train."""
    model = tiny_model().train()
    model.model.vision_tower.requires_grad_(False)
    return model


def train_alone() -> dict[str, Any]:
    """Both samples in one process, gradients averaged as data parallelism does."""
    model = frozen_tower_model()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for step in range(STEPS):
        loss = sum(model(**sample(rank, step)).loss for rank in range(2)) / 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return {"losses": losses, "weights": model.state_dict()}


def train(method: str, rank: int) -> dict[str, Any]:
    """The same with one sample a process."""
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    model = frozen_tower_model()
    if method == "ddp":
        model = DistributedDataParallel(model)  # find_unused_parameters stays off: there are none
    else:
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.language_model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for step in range(STEPS):
        loss = model(**sample(rank, step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(float(mean) / 2)
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if method == "fsdp2" and rank == 0:
        # As `pmod finetune` writes its result: an ordinary checkpoint of what was gathered.
        model.save_pretrained(Path(os.environ["PMOD_OUT"]) / "checkpoint", state_dict=weights)
    return {"losses": losses, "weights": weights}


def main() -> None:
    """One of the two processes."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    results = {method: train(method, rank) for method in ("ddp", "fsdp2")}
    if rank == 0:
        torch.save(results, Path(os.environ["PMOD_OUT"]) / "result.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
