"""Whole prefill of a model with random weights, p-MoD against dense: time ratio next to counted FLOPs ratio.

Image, projector, decoder, one row of logits. Both models share their weights and alternate in one process; medians
of the rounds. Run::

    python tests/benchmarks/prefill.py --json                      one billion decoder parameters, fp32, CPU
    python tests/benchmarks/prefill.py llava-1.5-7b --device cuda --dtype bfloat16
    python tests/benchmarks/prefill.py tiny                        seconds, to see that it works
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from pmod_cli.devices import find_device
from pmod_cli.profiling import closed_form
from pmod_cli.profiling.latency import make_inputs
from pmod_cli.profiling.options import ProfileOptions
from pmod_cli.profiling.placement import load_models
from pmod_cli.profiling.subject import Subject, find_subject


def geometry(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **vision: int) -> Any:
    """The config of a LLaVA of any size."""
    tower = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    }
    return {
        "model_type": "llava",
        "image_token_index": 32000,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "text_config": {
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": 32064,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            **tower,
            "patch_size": 14,
            "image_size": 336,
            "num_channels": 3,
            **vision,
        },
    }


GEOMETRIES = {
    "1b": geometry(2048, 5632, 22, 32, 4),
    "tiny": geometry(
        64, 128, 8, 4, 4, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    ),
}


def subject_of(model: str) -> Subject:
    """A geometry from above, or any MODEL that ``pmod profile`` takes; p-MoD by the paper's settings."""
    if model not in GEOMETRIES:
        return find_subject(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(GEOMETRIES[model]), encoding="utf-8")
        return find_subject(str(path))


def prefill_seconds(model: Any, inputs: dict[str, torch.Tensor]) -> float:
    """Seconds of one prefill that fills a new cache."""
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.inference_mode():
        model(**inputs, use_cache=True, logits_to_keep=1)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(model: str, settings: ProfileOptions, device: str, repeats: int) -> dict[str, Any]:
    """Counted and measured ratios of one geometry."""
    subject = subject_of(model)
    variants = subject.variants
    works = {role: settings.workload(variant.geometry) for role, variant in variants.items()}
    macs = {role: closed_form.prefill(v.geometry, v.mod, works[role]).macs for role, v in variants.items()}
    models = load_models(subject, find_device(device), settings.dtype)
    inputs = make_inputs(models["dense"], works["dense"])
    for each in models.values():
        prefill_seconds(each, inputs)  # warm-up
    rounds = []
    for index in range(repeats):
        order = list(models.items())[:: 1 if index % 2 else -1]
        rounds.append({role: prefill_seconds(each, inputs) for role, each in order})
    time_ratio = statistics.median(row["pmod"] / row["dense"] for row in rounds)
    fastest = {role: min(row[role] for row in rounds) for role in models}
    flops_ratio = macs["pmod"] / macs["dense"]
    return {
        "model": model,
        "decoder_parameters": sum(p.numel() for p in models["dense"].model.language_model.parameters()),
        "prompt_tokens": works["dense"].prompt_tokens,
        "gflops": {role: 2e-9 * count for role, count in macs.items()},
        "seconds": {role: statistics.median(row[role] for row in rounds) for role in models},
        "flops_ratio": flops_ratio,
        "time_ratio": time_ratio,
        "time_ratio/flops_ratio": time_ratio / flops_ratio,
        "fastest_ratio/flops_ratio": fastest["pmod"] / fastest["dense"] / flops_ratio,
        "rounds": rounds,
    }


def versions() -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="1b")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--text-tokens", type=int, default=124)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    settings = ProfileOptions(
        text_tokens=args.text_tokens, batch=args.batch, dtype=args.dtype, logits="last", counter="formula"
    )
    result = measure(args.model, settings, args.device, args.repeats)
    if args.json:
        print(json.dumps({**result, "arguments": vars(args), "versions": versions()}, indent=2))
        return
    for name, value in result.items():
        print(f"{name:24} {value}")


if __name__ == "__main__":
    main()
