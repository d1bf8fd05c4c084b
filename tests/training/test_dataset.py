"""Order of the samples and the shape of pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pmod_cli.training.aspect import apply_aspect
from pmod_cli.training.dataset import Sample, Turn
from pmod_cli.training.sampler import OrderedSampler


def _samples():
    return [
        Sample(
            str(i), ("x.png",) if i % 3 else (), (Turn("user", "a" * (i * 37 % 101)), Turn("assistant", "b"))
        )
        for i in range(101)
    ]


@pytest.mark.parametrize("group", [None, 8])
def test_an_order_is_a_permutation_that_seed_and_epoch_decide(group):
    samples = _samples()

    def order(seed, epoch):
        sampler = OrderedSampler(samples, seed, group)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert sorted(order(1, 0)) == list(range(101))
    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


def test_groups_are_of_one_modality():
    samples = _samples()
    order = list(OrderedSampler(samples, 3, 8))
    groups = [order[i : i + 8] for i in range(0, 101, 8)]
    pure = [len({bool(samples[i].images) for i in group}) == 1 for group in groups]
    # 34 without and 67 with pictures: 4 and 8 whole groups, what is left is mixed.
    assert pure[:12] == [True] * 12


def test_pad_keeps_the_whole_picture(baseline):
    from pmod_cli.generation import VisionLanguageModel

    loaded = VisionLanguageModel.load(baseline, dtype="float32", device="cpu")
    picture = np.full((40, 80, 3), 255, np.uint8)
    picture[:, :8] = 0
    picture[:, -8:] = 0
    image = Image.fromarray(picture)
    processor = apply_aspect(loaded.model, loaded.processor, "pad")
    pixels = processor.image_processor([image], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 80, 80)
    row = pixels[0, 0, 40]
    assert row[0] == row[-1] == row.min()
    # Above and below is the mean colour, which is zero once normalised.
    assert torch.all(pixels[0, :, 2].abs() < 0.02)
