"""The demo's small LLaVA: tokenizer, processor, and a model of transformers' own classes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from pmod_cli.demo import world

PATCH_SIZE = 8
VISION_TOKENS = (world.IMAGE_SIZE // PATCH_SIZE) ** 2
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] is string %}{% set parts = [{'type': 'text', 'text': message['content']}] %}"
    "{% else %}{% set parts = message['content'] %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ 'ASSISTANT:' }}"
    "{% for part in parts if part['type'] == 'text' %}"
    "{% generation %}{{ ' ' + part['text'] + eos_token }}{% endgeneration %}"
    "{% endfor %}"
    "{% else %}{{ message['role'] | upper + ': ' }}"
    "{% for part in parts if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in parts if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: one token for each word of the world; any other text is spelled out."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        min_frequency=1,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    lines = (f"USER: \n{line} ASSISTANT: {line}" for line in vocabulary())
    tokenizer.train_from_iterator(lines, trainer)
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def vocabulary() -> Iterator[str]:
    """Every question and answer of the world, one on each line, for a tokenizer to learn from."""
    yield from ("How many shapes are there?", "Describe the picture.", "List the shapes.")
    yield from ("yes", "no", *world.NUMBERS)
    for place, phrase in world.PHRASES.items():
        yield from (f"What colour is the shape {phrase}?", f"What shape is {phrase}?", place)
    for shape in world.SHAPES:
        yield from (f"What colour is the {shape}?", f"Where is the {shape}?", f"a {shape} and a {shape}")
        for colour in world.COLOURS:
            yield from (f"What shape is {colour}?", f"Where is the {colour} shape?")
            yield f"Is there a {colour} {shape}?"


def build_processor() -> LlavaProcessor:
    """The processor: `build_tokenizer`, a PIL image processor, and a chat template in vicuna style."""
    side = {"height": world.IMAGE_SIZE, "width": world.IMAGE_SIZE}
    image_processor = CLIPImageProcessorPil(
        size=side, crop_size=side, image_mean=[0.85] * 3, image_std=[0.25] * 3, do_center_crop=True
    )
    return LlavaProcessor(
        image_processor,
        build_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(
    processor: LlavaProcessor, *, seed: int = 0, **text_config: Any
) -> LlavaForConditionalGeneration:
    """A fresh model of 1.3 M parameters: CLIP tower of 3 layers, projector, Llama of 8 layers, all 96 wide.

    Args:
        processor: Where the token ids come from.
        seed: Seed of the initial weights.
        text_config: Changes to the Llama's configuration.
    """
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=world.IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=96,
    )
    text = LlamaConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 2048,
            "initializer_range": 0.06,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        | text_config
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=processor.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=VISION_TOKENS,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    _place_positions(model)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def _place_positions(model: LlavaForConditionalGeneration) -> None:
    """Start the tower's position embeddings as two-dimensional sinusoids: places are then learned soon."""
    table = model.model.vision_tower.embeddings.position_embedding.weight
    side, quarter = world.IMAGE_SIZE // PATCH_SIZE, table.shape[1] // 4
    angles = torch.arange(side)[:, None] * math.pi / side * torch.linspace(0.5, 4.0, quarter)
    waves = torch.cat((angles.sin(), angles.cos()), dim=1)  # (side, width / 2)
    grid = torch.cat((waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)), dim=2)
    with torch.no_grad():
        table[1:] = 0.3 * grid.reshape(side * side, -1)
