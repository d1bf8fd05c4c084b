"""Samples to batches: their order, image processing, expansion of image placeholders, padding.

Encoding and padding run in the data loader's workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler

from pmod_cli.data.chat import IGNORED, ChatEncoder, Encoded
from pmod_cli.data.pictures import Pictures
from pmod_cli.data.records import BadSample, Conversation
from pmod_cli.data.table import Shapes
from pmod_cli.families.processing import picture_ids, picture_inputs
from pmod_cli.output.errors import PmodError

_TEMPLATE_TOKENS = 64
"""Tokens, at most, that a chat template puts around a turn."""

_LARGE = [[4096, 4096], [3072, 4096]]
"""Pictures, (height, width), of which one takes the most tokens where there are no fixed grids."""

_MEGABATCH = 50
"""Global batches among which samples of like length are brought together."""


@dataclass(frozen=True)
class Example:
    """An encoded sample with its decoded images, and the samples it stands in for: (id, reason) each."""

    id: str
    encoded: Encoded
    images: list[Image.Image]
    replaced: tuple[tuple[str, str], ...] = ()


class EncodedDataset(Dataset[Example]):
    """Encodes samples when they are asked for; a bad one is replaced by the next good one.

    Their images are those of ``pictures``; ``max_length`` is in tokens, image tokens included; for ``image_position``
    see `ChatEncoder`.
    """

    def __init__(
        self,
        samples: Sequence[Conversation],
        pictures: Pictures,
        processor: Any,
        max_length: int,
        image_position: str = "written",
    ) -> None:
        self.samples, self.pictures, self.processor = samples, pictures, processor
        self.encoder = ChatEncoder(processor, max_length, image_position)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Example:
        replaced: list[tuple[str, str]] = []
        for step in range(len(self.samples)):
            sample = self.samples[(index + step) % len(self.samples)]
            try:
                images = [self.pictures.load(name) for name in sample.images]
                return Example(sample.id, self.encode(sample, images), images, tuple(replaced))
            except BadSample as error:
                replaced.append((sample.id, str(error)))
        raise PmodError(f"no sample can be used; the first: {replaced[0][1]}", "see pmod data check")

    def encode(self, sample: Conversation, images: Sequence[Image.Image]) -> Encoded:
        """Token ids and labels of a sample whose images are at hand."""
        pictures = self.encoder.picture_ids([image.size for image in images])
        return self.encoder.encode(sample.turns, pictures)


def longest_sample(dataset: EncodedDataset) -> tuple[int, int]:
    """At most how many tokens a sample has, and how many of these are its pictures'; no picture is opened.

    A token is at least one character; a picture takes the most that any shape takes.
    """
    pinpoints = getattr(dataset.processor.image_processor, "image_grid_pinpoints", None) or _LARGE
    picture = max(len(picture_ids(dataset.processor, [(width, height)])[0]) for height, width in pinpoints)

    shapes = Shapes.of(dataset.samples)
    vision = picture * shapes.images.astype(np.int64)
    text = shapes.octets + _TEMPLATE_TOKENS * (shapes.turns + 1)
    tokens = np.minimum(text + vision, dataset.encoder.max_length)
    longest = int(tokens.max())
    return longest, min(int(vision[tokens == longest].max()), longest)


class Collator:
    """Pads on the right and processes the images.

    With ``image_for_text`` a batch without images gets a blank one, so that the projector takes part on every rank
    (distributed training waits for it). It stands after the end of the first row: it is not in the loss, and no token
    before it attends to it. ``logits_to_keep`` says whether the model knows that argument.
    """

    def __init__(self, processor: Any, *, image_for_text: bool = False, logits_to_keep: bool = True) -> None:
        self.processor, self.image_for_text, self.logits_to_keep = processor, image_for_text, logits_to_keep

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """A batch of the model's inputs, and ``notes`` on it: ``ids``, ``replaced`` samples, real ``tokens``.

        Labels are cut before the first answer, and ``logits_to_keep`` has the model's head leave out the same
        tokens, most of them vision tokens: the loss is the same, without their logits.
        """
        ids = [example.encoded.input_ids for example in examples]
        labels = [example.encoded.labels for example in examples]
        mask = [[1] * len(row) for row in ids]
        images = [example.images for example in examples]
        if not any(images) and self.image_for_text:
            images[0] = [Image.new("RGB", (64, 64))]
            [blank] = picture_ids(self.processor, [(64, 64)])
            ids[0] = ids[0] + blank
            labels[0], mask[0] = labels[0] + [IGNORED] * len(blank), mask[0] + [1] * len(blank)
        length = max(map(len, ids))

        def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
            return torch.tensor([row + [fill] * (length - len(row)) for row in rows])

        # The logits of a token are about the next one: keep those from the token before the first answer.
        answers = [next(place for place, label in enumerate(row) if label != IGNORED) for row in labels]
        first = max(0, min(answers) - 1) if self.logits_to_keep else 0
        batch: dict[str, Any] = {
            "input_ids": padded(ids, self.processor.tokenizer.pad_token_id),
            "labels": padded(labels, IGNORED)[:, first:],
            "attention_mask": padded(mask, 0),
        }
        if self.logits_to_keep:
            batch["logits_to_keep"] = length - first
        batch |= picture_inputs(self.processor, images)
        if "mm_token_type_ids" in self.processor.model_input_names:
            image = self.processor.tokenizer.convert_tokens_to_ids(self.processor.image_token)
            batch["mm_token_type_ids"] = (batch["input_ids"] == image).long()
        batch["notes"] = {
            "ids": [example.id for example in examples],
            "replaced": [pair for example in examples for pair in example.replaced],
            "tokens": sum(len(example.encoded.input_ids) for example in examples),
        }
        return batch


class OrderedSampler(Sampler[int]):
    """Shuffled anew every epoch, from the seed.

    Args:
        samples: The data set.
        seed: Of the order.
        group: If given, samples of like length and modality share batches of this size (LLaVA's
            ``group_by_modality_length``): a batch is all with images or all without, longest first within.
    """

    def __init__(self, samples: Sequence[Conversation], seed: int, group: int | None = None) -> None:
        self.shapes, self.seed, self.group = Shapes.of(samples), seed, group
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.shapes.images)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        if self.group is None:
            return iter(torch.randperm(len(self), generator=generator).tolist())
        batches: list[np.ndarray] = []
        rest: list[np.ndarray] = []  # of both modalities: it comes last, in one mixed batch or two
        for with_images in (True, False):
            those = np.flatnonzero((self.shapes.images > 0) == with_images)
            shuffled = those[torch.randperm(len(those), generator=generator).numpy()]
            for start in range(0, len(shuffled), self.group * _MEGABATCH):
                mega = shuffled[start : start + self.group * _MEGABATCH]
                mega = mega[np.argsort(-self.shapes.characters[mega], kind="stable")]
                for first in range(0, len(mega), self.group):
                    batch = mega[first : first + self.group]
                    (batches if len(batch) == self.group else rest).append(batch)
        order = torch.randperm(len(batches), generator=generator).tolist()
        return iter(np.concatenate([*(batches[i] for i in order), *rest]).tolist())
