"""The order of the samples: a function of seed and epoch alone, so that a resumed run continues it exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from pmod_cli.data.records import Sample

_MEGABATCH = 50
"""Global batches among which samples of like length are brought together."""


class OrderedSampler(Sampler[int]):
    """Shuffled anew every epoch, from the seed.

    Args:
        samples: The data set.
        seed: Of the order.
        group: If given, samples of like length and modality share batches of this size (LLaVA's
            ``group_by_modality_length``): a batch is all with images or all without, longest first within.
    """

    def __init__(self, samples: Sequence[Sample], seed: int, group: int | None = None) -> None:
        self.samples, self.seed, self.group = samples, seed, group
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        if self.group is None:
            return iter(torch.randperm(len(self.samples), generator=generator).tolist())
        return iter(grouped_order(self.samples, self.group, generator))


def grouped_order(samples: Sequence[Sample], size: int, generator: torch.Generator) -> list[int]:
    """An order whose consecutive ``size`` samples are of one modality and of like length.

    The remainders of both modalities come last, in one mixed batch or two.
    """
    lengths = [sum(len(turn.text) for turn in sample.turns) for sample in samples]
    batches: list[list[int]] = []
    rest: list[int] = []
    for with_images in (True, False):
        those = [index for index, sample in enumerate(samples) if bool(sample.images) == with_images]
        shuffled = [those[i] for i in torch.randperm(len(those), generator=generator).tolist()]
        for start in range(0, len(shuffled), size * _MEGABATCH):
            mega = shuffled[start : start + size * _MEGABATCH]
            mega.sort(key=lambda index: -lengths[index])
            groups = [mega[i : i + size] for i in range(0, len(mega), size)]
            batches += [group for group in groups if len(group) == size]
            rest += [index for group in groups if len(group) < size for index in group]
    order = torch.randperm(len(batches), generator=generator).tolist()
    return [index for i in order for index in batches[i]] + rest
