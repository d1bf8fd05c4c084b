"""Which parts of a model are trained."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

PARTS = (
    ("routers", ".router."),
    ("vision tower", "vision_tower."),
    ("projector", "multi_modal_projector."),
    ("image newline", "image_newline"),
    ("language model", ""),
)
"""Part and what the names of its parameters contain; the first that fits counts."""


@dataclass(frozen=True)
class PartCount:
    """Parameters of one part, by number."""

    part: str
    trained: int
    frozen: int


def part_of(name: str) -> str:
    """The part that a parameter belongs to, by its name."""
    return next(part for part, mark in PARTS if mark in name)


def freeze(model: nn.Module, *, vision_tower: bool) -> None:
    """Train everything, but for the vision tower if so asked."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (vision_tower and part_of(name) == "vision tower"))


def count_parts(model: nn.Module) -> list[PartCount]:
    """Trained and frozen parameters of the parts that the model has."""
    counts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        counts.setdefault(part_of(name), [0, 0])[0 if parameter.requires_grad else 1] += parameter.numel()
    return [PartCount(part, *counts[part]) for part, _ in PARTS if part in counts]
