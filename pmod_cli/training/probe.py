"""What the routers do on a fixed batch, looked at now and then while a model trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pmod_cli.data.collate import Collator, EncodedDataset
from pmod_cli.modeling.names import is_router

PROBE_SAMPLES = 8


def make_probe(
    model: nn.Module, dataset: EncodedDataset, collator: Collator, size: int
) -> list[dict[str, Any]]:
    """Batches of ``size`` fixed samples with images, `PROBE_SAMPLES` in all.

    Empty for a dense model and for data without images.
    """
    if not any(is_router(name) for name, _ in model.named_parameters()):
        return []
    chosen = [index for index, sample in enumerate(dataset.samples) if sample.images][:PROBE_SAMPLES]
    batches = [chosen[start : start + size] for start in range(0, len(chosen), size)]
    made = [collator([dataset[index] for index in batch]) for batch in batches]
    return [{key: value for key, value in batch.items() if key not in ("labels", "notes")} for batch in made]


@torch.no_grad()
def router_statistics(
    model: Any, probe: list[dict[str, Any]], previous: dict[int, Tensor]
) -> tuple[list[dict[str, Any]], dict[int, Tensor]]:
    """What each router does on a fixed set of samples.

    Args:
        model: A p-MoD model.
        probe: See `make_probe`.
        previous: Kept masks of the look before, by layer; empty at first.

    Returns:
        One row a Mixture-of-Depths layer: ``layer``, ``mean_weight`` of the vision tokens, ``changed`` (share
        of the vision tokens whose fate differs from the look before; None at the first) and ``entropy`` (of the
        kept share over the image's positions: 1 where all positions are kept alike, 0 where one alone is); and
        the kept masks.
    """
    was_training = model.training
    model.eval()
    kept: dict[int, list[Tensor]] = {}
    weights: dict[int, list[Tensor]] = {}
    for batch in probe:
        inputs = {
            key: value.to(model.device) if isinstance(value, Tensor) else value
            for key, value in batch.items()
        }
        vision = inputs["input_ids"] == model.config.image_token_id
        output = model(**{**inputs, "logits_to_keep": 1}, use_cache=False, output_routing=True)
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
    """Normalised entropy of how often each place of the image is kept, as far as all images reach."""
    length = min(map(len, rows))
    share = torch.stack([row[:length].float() for row in rows]).mean(0)
    if length < 2 or not share.sum():
        return 0.0
    share = share / share.sum()
    return float(torch.special.entr(share).sum() / torch.tensor(float(length)).log())
