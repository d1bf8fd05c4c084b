"""Time of a training step, p-MoD over dense, alternating in one run; not a test.

python tests/benchmarks/train_step.py                              the demo's model
python tests/benchmarks/train_step.py --hidden 2048 --layers 16 --vision 576 --batch 1 --steps 3   1-billion-shaped
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from pmod_cli.families.llava import PmodLlavaConfig, PmodLlavaForConditionalGeneration
from pmod_cli.modeling.settings import MoDConfig
from pmod_cli.recipe import ModSettings

IMAGE_TOKEN = 5


def main() -> None:
    """Build both models of one geometry, and time forward, backward and optimizer."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (
        ("hidden", 96),
        ("layers", 8),
        ("vision", 100),
        ("text", 60),
        ("batch", 16),
        ("steps", 10),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    side = round(options.vision**0.5)
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=8 * side,
        patch_size=8,
    )
    text = LlamaConfig(
        vocab_size=400,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 8 // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=max(4, options.hidden // 64),
    )
    common = {
        "vision_config": vision,
        "text_config": text,
        "image_token_id": IMAGE_TOKEN,
        "vision_feature_layer": -1,
    }
    section = MoDConfig(list(ModSettings().retention_ratios(options.layers))).to_dict()
    models = {
        "dense": LlavaForConditionalGeneration(LlavaConfig(**common)),
        "pmod": PmodLlavaForConditionalGeneration(PmodLlavaConfig(**common, mod=section)),
    }
    ids = torch.full((options.batch, side * side + options.text), 7)
    ids[:, 5 : 5 + side * side] = IMAGE_TOKEN
    labels = ids.clone()
    labels[:, : -options.text // 2] = -100
    pixels = torch.rand(options.batch, 3, 8 * side, 8 * side)
    dtype = getattr(torch, options.dtype)
    inputs = {
        "input_ids": ids,
        "labels": labels,
        "pixel_values": pixels.to(dtype),
        "attention_mask": torch.ones_like(ids),
    }
    inputs = {name: value.to(options.device) for name, value in inputs.items()}
    steps = {name: _stepper(model.to(options.device, dtype), inputs) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(options.steps + 1):
        for name, step in steps.items():
            taken = step()
            if round_:  # the first is warm-up
                seconds[name].append(taken)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    print(
        f"dense {median['dense']:.4f} s, p-MoD {median['pmod']:.4f} s, ratio {median['pmod'] / median['dense']:.3f}"
    )


def _stepper(model, inputs):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision_tower" not in name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    model.train()

    def step() -> float:
        began = time.perf_counter()
        model(**inputs, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if inputs["input_ids"].is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return step


if __name__ == "__main__":
    main()
