"""Samples to batches: image processing, expansion of image placeholders, padding. Runs in the loader's workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from pmod_cli.data.chat import IGNORED, ChatEncoder, Encoded
from pmod_cli.data.pictures import Pictures
from pmod_cli.data.records import BadSample, Sample
from pmod_cli.output.errors import PmodError

_TURN = 64
"""Tokens, at most, that a chat template puts around a turn."""


@dataclass(frozen=True)
class Item:
    """An encoded sample with its decoded images, and the samples it stands in for: (id, reason) each."""

    id: str
    encoded: Encoded
    images: list[Image.Image]
    replaced: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class BatchNotes:
    """What the trainer wants to know of a batch: ids, samples that were replaced (id, reason), real tokens."""

    ids: list[str]
    replaced: list[tuple[str, str]]
    tokens: int


class EncodedDataset(Dataset[Item]):
    """Encodes samples when they are asked for; a bad one is replaced by the next good one.

    Args:
        samples: What to encode.
        pictures: Where their images are.
        processor: The model's processor.
        max_length: In tokens, image tokens included.
    """

    def __init__(
        self, samples: Sequence[Sample], pictures: Pictures, processor: Any, max_length: int
    ) -> None:
        self.samples, self.pictures, self.processor = samples, pictures, processor
        self.encoder = ChatEncoder(processor, max_length)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Item:
        replaced: list[tuple[str, str]] = []
        for step in range(len(self.samples)):
            sample = self.samples[(index + step) % len(self.samples)]
            try:
                images = [self.pictures.load(name) for name in sample.images]
                return Item(sample.id, self.encode(sample, images), images, tuple(replaced))
            except BadSample as error:
                replaced.append((sample.id, str(error)))
        raise PmodError(f"no sample can be used; the first: {replaced[0][1]}", "see pmod data check")

    def encode(self, sample: Sample, images: Sequence[Image.Image]) -> Encoded:
        """Token ids and labels of a sample whose images are at hand."""
        return self.encoder.encode(sample.turns, image_token_numbers(self.processor, images))


def image_token_numbers(processor: Any, images: Sequence[Image.Image]) -> list[int]:
    """How many tokens each image takes in the prompt."""
    if not images:
        return []
    counted = processor._get_num_multimodal_tokens(image_sizes=[image.size[::-1] for image in images])
    return list(counted["num_image_tokens"])


def longest_sample(dataset: EncodedDataset) -> tuple[int, int]:
    """At most how many tokens a sample has, and how many of these are its pictures'; no picture is opened.

    A token is at least one character; a picture takes the most that any shape takes.
    """
    processor = dataset.processor
    pinpoints = getattr(processor.image_processor, "image_grid_pinpoints", None) or [[336, 336]]
    sizes = [tuple(pinpoint) for pinpoint in pinpoints]
    picture = max(processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"])

    def lengths(sample: Sample) -> tuple[int, int]:
        vision = picture * len(sample.images)
        text = sum(len(turn.text.encode()) + _TURN for turn in sample.turns) + _TURN
        tokens = min(text + vision, dataset.encoder.max_length)
        return tokens, min(vision, tokens)

    return max(map(lengths, dataset.samples))


class Collator:
    """Pads on the right and processes the images.

    Args:
        processor: The model's processor.
        image_for_text: Give a batch without images a blank one after the end of its first row, out of the loss
            and, by causality, out of everybody's sight, so that the projector takes part on every rank
            (distributed training waits for it).
    """

    def __init__(self, processor: Any, *, image_for_text: bool = False) -> None:
        self.processor, self.image_for_text = processor, image_for_text
        tokenizer = processor.tokenizer
        self.padding = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        """A batch of the model's inputs, and ``notes`` on it for the trainer.

        Labels are cut before the first answer, and ``logits_to_keep`` has the model's head leave out the same
        tokens, most of them vision tokens: the loss is the same, without their logits.
        """
        ids = [item.encoded.input_ids for item in items]
        labels = [item.encoded.labels for item in items]
        mask = [[1] * len(row) for row in ids]
        images = [image for item in items for image in item.images]
        if not images and self.image_for_text:
            images = [Image.new("RGB", (64, 64))]
            blank = image_token_numbers(self.processor, images)[0]
            token = self.processor.tokenizer.convert_tokens_to_ids(self.processor.image_token)
            ids[0] = ids[0] + [token] * blank
            labels[0], mask[0] = labels[0] + [IGNORED] * blank, mask[0] + [1] * blank
        length = max(map(len, ids))

        def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
            return torch.tensor([row + [fill] * (length - len(row)) for row in rows])

        # The logits of a token are about the next one: keep those from the token before the first answer.
        first = max(0, min(map(_first_label, labels)) - 1)
        batch: dict[str, Any] = {
            "input_ids": padded(ids, self.padding),
            "labels": padded(labels, IGNORED)[:, first:],
            "attention_mask": padded(mask, 0),
            "logits_to_keep": length - first,
        }
        if images:
            batch |= self.processor.image_processor(images, return_tensors="pt")
        batch["notes"] = BatchNotes(
            [item.id for item in items],
            [pair for item in items for pair in item.replaced],
            sum(len(item.encoded.input_ids) for item in items),
        )
        return batch


def _first_label(labels: Sequence[int]) -> int:
    return next(index for index, label in enumerate(labels) if label != IGNORED)
