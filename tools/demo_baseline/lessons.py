"""What the demo's baseline is taught: its batches and losses, apart from the loop that runs them.

Learning goes in two stages, as a LLaVA's does. First the tower and the projector learn to say, patch by
patch, what is there, against the word embeddings of the language model (`patch_loss`). Then the whole model
learns to answer (`answer_loss`), early on many lists such as `red circle left, square right blue`: there each
word after the first asks for what belongs to the word before it, the one skill that all questions rest on.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from pmod_cli.demo import world

IGNORED = -100
_EMPTY_WORD = "no"  # what an empty patch says
_ATTRIBUTES = (tuple(world.COLOURS), world.SHAPES, tuple(world.PLACES))

Conversation = tuple[world.Scene, list[world.Question]]


def patch_loss(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, scenes: Sequence[world.Scene]
) -> tuple[Tensor, float]:
    """How well each projected patch names the colour, shape and place of what covers it.

    Args:
        model: The model; only tower, projector and word embeddings take part.
        processor: Its processor.
        scenes: The scenes to look at.

    Returns:
        The cross-entropy, summed over the attributes, and the share of covered patches with the right shape.
    """
    pixels = _pixels(processor, scenes)
    truth = _patch_targets(pixels, scenes, processor.patch_size)  # (batch, patches, 3)
    features = model.get_image_features(
        pixel_values=pixels,
        vision_feature_layer=model.config.vision_feature_layer,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
    ).pooler_output
    patches = torch.stack(list(features))  # (batch, patches, hidden)
    words = model.get_input_embeddings().weight
    loss, accuracy = patches.new_zeros(()), 0.0
    for index, names in enumerate(_ATTRIBUTES):
        logits = patches @ words[[_word_id(processor, name) for name in (*names, _EMPTY_WORD)]].T
        target = truth[..., index]
        weight = torch.where(target == len(names), 0.3, 1.0)
        each = functional.cross_entropy(logits.transpose(1, 2), target, reduction="none")
        loss = loss + (each * weight).sum() / weight.sum()
        if names is world.SHAPES:
            covered = target != len(names)
            accuracy = float((logits.argmax(-1) == target)[covered].float().mean())
    return loss, accuracy


def answer_loss(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    conversations: Sequence[Conversation],
    *,
    apart: bool,
) -> tuple[Tensor, float]:
    """How well the model answers.

    Args:
        model: The model.
        processor: Its processor.
        conversations: Pictures with their questions.
        apart: See `pack`.

    Returns:
        The mean cross-entropy of the answers' tokens and the share of those that are predicted.
    """
    batch = pack(processor, conversations, apart=apart)
    labels = batch.pop("labels")[:, 1:]
    asked = labels != IGNORED
    logits = model(**batch, use_cache=False).logits[:, :-1][asked]
    loss = functional.cross_entropy(logits.float(), labels[asked])
    return loss, float((logits.argmax(-1) == labels[asked]).float().mean())


def draw_lesson(rng: random.Random, progress: float) -> Conversation:
    """Draw a picture with questions to answer apart from each other.

    Args:
        rng: The source of chance.
        progress: How much of the learning is done, from 0 to 1: lists first, then more questions.
    """
    early = progress < 0.4
    scene = world.draw_scene(rng, "train", 1 if rng.random() < (0.15 if early else 0.3) else 2)
    kinds = rng.sample(["colour", "shape", "place", "exists"] * 2, 5 if early else 7)
    if rng.random() < 0.2:
        kinds[-1] = "count"
    questions = [world.ask(rng, scene, kind) for kind in kinds]
    questions += [list_question(rng, scene) for _ in range(3 if early else 1)]
    rng.shuffle(questions)
    return scene, questions


def draw_conversation(rng: random.Random) -> Conversation:
    """Draw a picture with a conversation as in the training data on disk: one question of each kind."""
    scene = world.draw_scene(rng, "train")
    return scene, world.ask_each(rng, scene)


def pack(
    processor: LlavaProcessor, conversations: Sequence[Conversation], *, apart: bool
) -> dict[str, Tensor]:
    """One batch of pictures, each with several questions, as inputs of the model.

    Args:
        processor: The processor.
        conversations: Pictures with their questions.
        apart: If true, each question sees only the picture, as if it was asked alone: all questions follow
            the same picture's tokens at the same positions, and the mask keeps them from each other. If
            false, the questions are turns of one conversation.

    Returns:
        `input_ids`, `position_ids` and `labels` (batch, length), a boolean `attention_mask` (batch, 1,
        length, length) and `pixel_values`. Only answers have labels.
    """
    tokenizer = processor.tokenizer
    head = tokenizer("USER: " + processor.image_token * _vision_tokens(processor) + "\n").input_ids
    rows = []
    for _, questions in conversations:
        ids, labels = list(head), [IGNORED] * len(head)
        positions, turns = list(range(len(head))), [0] * len(head)
        for turn, question in enumerate(questions, start=1):
            asked = ("USER: " if turn > 1 and not apart else "") + question.text + " ASSISTANT:"
            prompt = tokenizer(asked, add_special_tokens=False).input_ids
            answer = tokenizer(f" {question.answer}</s>", add_special_tokens=False).input_ids
            start = len(head) if apart else len(ids)
            ids += prompt + answer
            labels += [IGNORED] * len(prompt) + answer
            positions += range(start, start + len(prompt) + len(answer))
            turns += [turn] * (len(prompt) + len(answer))
        rows.append((ids, labels, positions, turns))
    length = max(len(row[0]) for row in rows)

    def padded(column: int, fill: int) -> Tensor:
        return torch.tensor([row[column] + [fill] * (length - len(row[column])) for row in rows])

    turn_of = padded(3, -1)
    mask = torch.ones(length, length, dtype=torch.bool).tril() & (turn_of >= 0)[:, None, :]
    if apart:
        mask &= (turn_of[:, None, :] == 0) | (turn_of[:, None, :] == turn_of[:, :, None])
    mask |= torch.eye(length, dtype=torch.bool)
    return {
        "input_ids": padded(0, tokenizer.pad_token_id),
        "labels": padded(1, IGNORED),
        "position_ids": padded(2, 0),
        "attention_mask": mask[:, None],
        "pixel_values": _pixels(processor, [scene for scene, _ in conversations]),
    }


def _pixels(processor: LlavaProcessor, scenes: Sequence[world.Scene]) -> Tensor:
    images = [world.render(scene) for scene in scenes]
    pixels: Tensor = processor.image_processor(images, return_tensors="pt").pixel_values
    return pixels


def _patch_targets(pixels: Tensor, scenes: Sequence[world.Scene], patch_size: int) -> Tensor:
    """Per patch the indices of its colour, shape and place, past the last if empty: (batch, patches, 3)."""
    difference = (pixels - pixels[:, :, :1, :1]).abs().amax(1, keepdim=True)  # the corner pixel is background
    covered = functional.max_pool2d(difference, patch_size)[:, 0] > 0.15
    middles = torch.arange(covered.shape[-1]) * patch_size + (patch_size - 1) / 2
    targets = torch.empty(*covered.shape, len(_ATTRIBUTES), dtype=torch.long)
    for row, scene in zip(targets, scenes, strict=True):
        items = torch.tensor([_indices(item) for item in scene.items])
        distances = [(middles[None] - item.x) ** 2 + (middles[:, None] - item.y) ** 2 for item in scene.items]
        row.copy_(items[torch.stack(distances).argmin(0)])
    empty = torch.tensor([len(names) for names in _ATTRIBUTES])
    return torch.where(covered[..., None], targets, empty).flatten(1, 2)


def _indices(item: world.Item) -> list[int]:
    named = (item.colour, item.shape, item.place)
    return [names.index(name) for names, name in zip(_ATTRIBUTES, named, strict=True)]


def _vision_tokens(processor: LlavaProcessor) -> int:
    return int((world.IMAGE_SIZE // processor.patch_size) ** 2)


def _word_id(processor: LlavaProcessor, word: str) -> int:
    return int(processor.tokenizer(f" {word}", add_special_tokens=False).input_ids[0])


def list_question(rng: random.Random, scene: world.Scene) -> world.Question:
    """Ask for all that the questions ask for, as in `left red circle, blue square right`, in a random order."""
    listed = [
        rng.sample((item.colour, item.shape, item.place), 3)
        for item in rng.sample(scene.items, len(scene.items))
    ]
    return world.Question("list", "List the shapes.", ", ".join(map(" ".join, listed)))
