"""Train the demo's baseline anew: the checkpoint in ``pmod_cli/demo/assets/baseline`` comes of this script.

Run with one thread for the very bytes of the shipped checkpoint::

    OMP_NUM_THREADS=1 python tools/demo_baseline/train.py --output baseline
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from lessons import answer_loss, draw_conversation, draw_lesson, patch_loss
from pmod_cli.demo import world
from pmod_cli.demo.data import HeldoutQuestion, heldout_samples
from small_llava import build_model, build_processor

DEFAULT_STEPS = 1800
"""Steps of the shipped checkpoint's training."""
_LOOKING_SHARE = 0.22  # of the steps, how many go into the first stage
_LOOKING_BATCH, _ANSWERING_BATCH = 64, 16
_WARM_UP = 30
_RATE, _MATRIX_RATE = 2e-3, 1e-2


def main() -> None:
    """Read the command line, train, and print the summary as JSON."""
    parser = argparse.ArgumentParser(description="Train the demo's baseline anew.")
    parser.add_argument("--output", type=Path, required=True, help="Folder of the checkpoint; must be new.")
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS, help="Two at least; default %(default)s.")
    parser.add_argument("--seed", type=int, default=0, help="Of the weights and the pictures.")
    options = parser.parse_args()
    if options.output.exists():
        parser.error(f"{options.output} exists: remove it or choose another --output")
    with Progress(console=Console(stderr=True)) as bars:
        bar = bars.add_task("training the baseline", total=options.steps)

        def advance(done: int, total: int, figures: dict[str, float]) -> None:
            text = f"training the baseline, loss {figures['loss']:.3f}"
            bars.update(bar, completed=done, total=total, description=text)

        summary = train_baseline(options.output, steps=options.steps, seed=options.seed, progress=advance)
    print(json.dumps({"model": str(options.output), **summary}, indent=2))


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
    samples: Sequence[HeldoutQuestion],
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


def _as_chat(sample: HeldoutQuestion) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample.question}]}]


if __name__ == "__main__":
    main()
