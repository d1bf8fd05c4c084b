"""The small LLaVA of the demo: tokenizer, processor, model from transformers' own classes, and training."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
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

from . import world
from .data import Sample, heldout_samples
from .lessons import answer_loss, draw_conversation, draw_lesson, patch_loss

PATCH_SIZE = 8
VISION_TOKENS = (world.IMAGE_SIZE // PATCH_SIZE) ** 2
DEFAULT_STEPS = 1800
"""Steps of `train_baseline`: so many that the shipped checkpoint comes of them."""
_LOOKING_SHARE = 0.22  # of the steps, how many go into the first stage
_LOOKING_BATCH, _ANSWERING_BATCH = 64, 16
_WARM_UP = 30
_RATE, _MATRIX_RATE = 2e-3, 1e-2
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
    lines = (f"USER: \n{line} ASSISTANT: {line}" for line in world.vocabulary())
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


def train_baseline(
    output: Path,
    *,
    steps: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
) -> dict[str, Any]:
    """Train the model from nothing and save it like any hub checkpoint, in bfloat16.

    The same seed on the same machine with the same number of threads gives the same checkpoint.

    Args:
        output: The folder of the checkpoint.
        steps: How many steps in all, two at least; `DEFAULT_STEPS` if None.
        seed: Seed of the initial weights and of the pictures.
        progress: Called after every step with the steps done, the steps in all, and the step's `loss` and
            `accuracy`.

    Returns:
        A summary for reports: `steps`, `seed`, `parameters`, `seconds` (of the training), `log` (mean loss
        and accuracy of each twentieth of the way), and `heldout` and `shuffled`: what `evaluate_exact_match`
        says of the saved checkpoint.
    """
    steps = DEFAULT_STEPS if steps is None else steps
    if steps < 2:
        raise ValueError(f"training takes two steps at least, not {steps}")
    began = time.perf_counter()
    processor = build_processor()
    model = build_model(processor, seed=seed).train()
    rng = random.Random(seed)
    optimizers = _optimizers(model)
    peaks = [[float(group["lr"]) for group in optimizer.param_groups] for optimizer in optimizers]
    looking = max(1, round(steps * _LOOKING_SHARE))
    log: list[dict[str, float]] = []
    recent: list[tuple[float, float]] = []
    for step in range(steps):
        if step < looking:
            done, total = step, looking
            scenes = [world.draw_scene(rng, "train") for _ in range(_LOOKING_BATCH)]
            loss, accuracy = patch_loss(model, processor, scenes)
        else:
            done, total = step - looking, steps - looking
            apart = done < total / 2 or done % 4 != 3  # later, every fourth batch is of whole conversations
            draw = partial(draw_lesson, progress=done / total) if apart else draw_conversation
            lessons = [draw(rng) for _ in range(_ANSWERING_BATCH)]
            loss, accuracy = answer_loss(model, processor, lessons, apart=apart)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = _rate_factor(done, total)
        for optimizer, rates in zip(optimizers, peaks, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        recent.append((loss.item(), accuracy))
        if progress is not None:
            progress(step + 1, steps, {"loss": recent[-1][0], "accuracy": accuracy})
        if (step + 1) % max(1, steps // 20) == 0 or step + 1 in (looking, steps):
            means = [sum(column) / len(recent) for column in zip(*recent, strict=True)]
            log.append({"step": step + 1, "loss": means[0], "accuracy": means[1]})
            recent.clear()
    model.eval().to(torch.bfloat16)
    model.save_pretrained(output)
    processor.save_pretrained(output)
    seconds = time.perf_counter() - began
    images = 120 if steps >= DEFAULT_STEPS else 4
    return {
        "steps": steps,
        "seed": seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": seconds,
        "log": log,
        "heldout": evaluate_exact_match(model, processor, heldout_samples(images)),
        "shuffled": evaluate_exact_match(model, processor, heldout_samples(images, shuffle=True)),
    }


def _optimizers(model: LlavaForConditionalGeneration) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, which then learn in fewer steps, and Adam for the rest."""
    inner: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_inner = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
        (inner if is_inner else rest).append(parameter)
    return [
        torch.optim.Muon(inner, lr=_MATRIX_RATE, weight_decay=0.01, adjust_lr_fn="original"),
        torch.optim.Adam(rest, lr=_RATE, betas=(0.9, 0.98)),
    ]


def _rate_factor(done: int, total: int) -> float:
    """Warm-up, then a cosine down to a twentieth."""
    return min(1.0, (done + 1) / _WARM_UP) * (0.05 + 0.95 * (0.5 + 0.5 * math.cos(math.pi * done / total)))


@torch.inference_mode()
def evaluate_exact_match(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    samples: Sequence[Sample],
    batch_size: int = 32,
) -> dict[str, float]:
    """Answer greedily, in batches, and compare.

    Args:
        model: Any model with the interface of LLaVA's.
        processor: Its processor, padding on the left.
        samples: The questions.
        batch_size: How many at a time.

    Returns:
        The share of exactly right answers, by kind in alphabetical order and as `overall`.
    """
    was_training = model.training
    model.eval()
    hits: dict[str, list[bool]] = {}
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        prompts = [processor.apply_chat_template(_as_chat(s), add_generation_prompt=True) for s in batch]
        inputs = processor(images=[s.image for s in batch], text=prompts, padding=True, return_tensors="pt")
        inputs = inputs.to(model.device, model.dtype)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=8)
        answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for sample, answer in zip(batch, answers, strict=True):
            hits.setdefault(sample.kind, []).append(answer.strip() == sample.answer)
    model.train(was_training)
    every = [hit for kind in hits.values() for hit in kind]
    scores = {kind: sum(hits[kind]) / len(hits[kind]) for kind in sorted(hits)}
    return scores | {"overall": sum(every) / max(1, len(every))}


def _as_chat(sample: Sample) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample.question}]}]
