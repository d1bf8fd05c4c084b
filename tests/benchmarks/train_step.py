"""Time of a training step, p-MoD over dense, alternating in one run; not a test.

python tests/benchmarks/train_step.py                    the demo's geometry
python tests/benchmarks/train_step.py --geometry 1b      1-billion-shaped, about 10 GB
python tests/benchmarks/train_step.py --geometry 7b --device cuda --dtype bfloat16    LLaVA-1.5-7B's

Both models hold the same parameters. As in training, the tower is frozen and the head leaves out the tokens before
the first answer. The optimizer is AdamW for the demo's geometry, and plain SGD, which has no state, for the others.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from pmod_cli.families.llava import PmodLlavaConfig, PmodLlavaForConditionalGeneration
from pmod_cli.modeling.settings import MoDConfig
from pmod_cli.recipe import ModSettings
from pmod_cli.training.model import freeze

IMAGE_TOKEN = 5
DEMO_TOWER = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
LARGE_TOWER = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
GEOMETRIES: dict[str, dict[str, Any]] = {
    "demo": {
        "text": {
            "vocab_size": 400,
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
        },
        "tower": {**DEMO_TOWER, "image_size": 80, "patch_size": 8},
        "tokens": (100, 60),
        "batch": 16,
    },
    "1b": {
        "text": {
            "vocab_size": 32064,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 22,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
        },
        "tower": {**LARGE_TOWER, "image_size": 224, "patch_size": 14},
        "tokens": (256, 32),
        "batch": 1,
    },
    "7b": {
        "text": {
            "vocab_size": 32064,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
        "tower": {**LARGE_TOWER, "image_size": 336, "patch_size": 14},
        "tokens": (576, 64),
        "batch": 1,
    },
}


def main() -> None:
    """Build both models of one geometry, and time forward, backward and optimizer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--geometry", choices=GEOMETRIES, default="demo")
    parser.add_argument("--batch", type=int, help="the geometry's by default")
    parser.add_argument("--steps", type=int, default=10, help="rounds that count; one more goes before")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    geometry = GEOMETRIES[options.geometry]
    models = _models(geometry, options.device, getattr(torch, options.dtype))
    inputs = _inputs(
        geometry, options.batch or geometry["batch"], options.device, getattr(torch, options.dtype)
    )
    kind = torch.optim.AdamW if options.geometry == "demo" else torch.optim.SGD
    steps = {name: _stepper(model, inputs, kind) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(options.steps + 1):
        for name, step in steps.items():
            taken = step()
            if round_:  # the first is warm-up
                seconds[name].append(taken)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    parameters = sum(p.numel() for p in models["dense"].parameters())
    print(
        f"{options.geometry}, {parameters / 1e6:.0f} M parameters, {torch.get_num_threads()} threads: "
        f"dense {median['dense']:.4f} s, p-MoD {median['pmod']:.4f} s, "
        f"ratio {median['pmod'] / median['dense']:.3f}"
    )


def _models(geometry: dict[str, Any], device: str, dtype: torch.dtype) -> dict[str, Any]:
    """The dense model, and a p-MoD model that holds the same parameters."""
    common: dict[str, Any] = {
        "vision_config": CLIPVisionConfig(**geometry["tower"]),
        "text_config": LlamaConfig(**geometry["text"]),
        "image_token_id": IMAGE_TOKEN,
        "vision_feature_layer": -1,
    }
    section = MoDConfig(list(ModSettings().retention_ratios(geometry["text"]["num_hidden_layers"]))).to_dict()
    with torch.device("meta"):
        dense = LlavaForConditionalGeneration(LlavaConfig(**common))
        pmod = PmodLlavaForConditionalGeneration(PmodLlavaConfig(**common, mod=section))
    shared: dict[str, torch.nn.Parameter] = {}
    for model in (dense, pmod):
        for name, parameter in list(model.named_parameters()):
            owner = model.get_submodule(name.rpartition(".")[0])
            if name not in shared:
                values = torch.empty(parameter.shape, device=device, dtype=dtype).uniform_(-0.02, 0.02)
                shared[name] = torch.nn.Parameter(values.add_(1.0 if "norm" in name else 0.0))
            setattr(owner, name.rpartition(".")[2], shared[name])
        # Position tables are not parameters: those of a model that was made in the ordinary way.
        _fill_buffers(model, device)
    return {"dense": dense, "pmod": pmod}


def _fill_buffers(model: torch.nn.Module, device: str) -> None:
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if not buffer.is_meta:
                continue
            if name == "position_ids":
                module.register_buffer(
                    name, torch.arange(buffer.shape[-1], device=device)[None], persistent=False
                )
            else:
                fresh = type(module)(module.config).to(device)  # rotary tables
                module.register_buffer(name, getattr(fresh, name), persistent=False)


def _inputs(geometry: dict[str, Any], batch: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    vision, text = geometry["tokens"]
    ids = torch.full((batch, vision + text), 7)
    ids[:, 5 : 5 + vision] = IMAGE_TOKEN
    answers = text // 2
    side = geometry["tower"]["image_size"]
    return {
        "input_ids": ids.to(device),
        "attention_mask": torch.ones_like(ids).to(device),
        "pixel_values": torch.rand(batch, 3, side, side).to(device, dtype),
        "labels": ids[:, -answers - 1 :].to(device),
        "logits_to_keep": answers + 1,
    }


def _stepper(model: Any, inputs: dict[str, Any], kind: Any) -> Callable[[], float]:
    freeze(model, vision_tower=True)
    model.train()
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=1e-7)

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
