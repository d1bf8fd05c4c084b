"""Everything there is to measure on a GPU, in one command; random bf16 weights, p-MoD against dense.

For each geometry: prefill, decode and end to end at batch 1 and at the largest batch that fits, peak memory, the
largest batch of each model for long decodes in the same memory, and what torch.profiler saw of one prefill. Run::

    python tests/benchmarks/gpu.py --out results          LLaVA-1.5-7B and LLaVA-NeXT-7B on the GPU, about 20 minutes
    python tests/benchmarks/gpu.py --model tiny --device cpu --max-batch 2 --out results      that the script works
"""

from __future__ import annotations

import argparse
import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from prefill import subject_of, versions
from torch.profiler import ProfilerActivity, profile

from pmod_cli.devices import find_device
from pmod_cli.modeling.compat import CACHE_ARGUMENT
from pmod_cli.output.errors import PmodError
from pmod_cli.profiling.latency import make_inputs
from pmod_cli.profiling.options import ProfileOptions
from pmod_cli.profiling.placement import load_models
from pmod_cli.profiling.profile import profile as count_and_measure

WAITS = (
    "cudaStreamSynchronize",
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "Memcpy DtoH (Device -> Pageable)",
)


def timed(model: str, settings: ProfileOptions, device: str, repeats: int) -> dict[str, Any]:
    """What ``pmod profile --latency`` measures, and the counted FLOPs ratio beside it."""
    options = replace(settings, latency=True, device=device, repeats=repeats)
    result = count_and_measure(subject_of(model), options)
    ratios, flops_ratio = result["ratios"], result["ratios"]["prefill_flops"]
    return {
        **result["latency"],
        "ratios": {key: ratio for key, ratio in ratios.items() if key.endswith("_seconds")},
        "flops_ratio": flops_ratio,
        "prefill_ratio/flops_ratio": ratios["prefill_seconds"] / flops_ratio,
    }


@torch.inference_mode()
def fits(model: Any, work: Any, new_tokens: int) -> bool:
    """Whether a prefill and ``new_tokens`` decode steps fit in memory."""
    try:
        inputs = make_inputs(model, work)
        output = model(**inputs, use_cache=True, logits_to_keep=1)
        cache, token = output[CACHE_ARGUMENT], output.logits[:, -1:].argmax(-1)
        del output, inputs
        for _ in range(new_tokens):
            step = {CACHE_ARGUMENT: cache, "use_cache": True, "logits_to_keep": 1}
            token = model(input_ids=token, **step).logits[:, -1:].argmax(-1)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        cache = token = None
        gc.collect()
        if model.device.type == "cuda":
            torch.cuda.empty_cache()


def largest_batch(model: Any, work: Any, new_tokens: int, limit: int) -> int:
    """Largest batch that fits, by doubling and halving; at most ``limit``."""
    good, bad = 0, limit + 1
    while bad - good > 1:
        size = min(2 * good or 1, limit) if bad > limit else (good + bad) // 2
        if fits(model, replace(work, batch=size), new_tokens):
            good = size
        else:
            bad = size
    return good


def profiled(model: Any, work: Any, folder: Path, name: str) -> dict[str, Any]:
    """One prefill under torch.profiler: waits for the device, busiest kernels, a trace to open in a browser."""
    inputs = make_inputs(model, work)
    cuda = model.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with torch.inference_mode():
        model(**inputs, use_cache=True, logits_to_keep=1)
        with profile(activities=activities) as recorded:
            model(**inputs, use_cache=True, logits_to_keep=1)
            if cuda:
                torch.cuda.synchronize()
    recorded.export_chrome_trace(str(folder / f"{name}.trace.json"))
    events = recorded.key_averages()
    attribute = "self_device_time_total" if cuda else "self_cpu_time_total"
    busiest = sorted(events, key=lambda event: getattr(event, attribute), reverse=True)[:15]
    return {
        "waits": {event.key: event.count for event in events if event.key in WAITS},
        "busiest": [
            {"name": event.key, "calls": event.count, "milliseconds": getattr(event, attribute) / 1e3}
            for event in busiest
        ],
    }


def measure(model: str, args: argparse.Namespace) -> dict[str, Any]:
    """All results of one geometry."""
    settings = ProfileOptions(dtype=args.dtype, new_tokens=args.new_tokens, logits="last", counter="formula")
    result: dict[str, Any] = {"batch_1": timed(model, settings, args.device, args.repeats)}
    subject = subject_of(model)
    models = load_models(subject, find_device(args.device), args.dtype)
    works = {role: settings.workload(variant.geometry) for role, variant in subject.variants.items()}
    result["profiler"] = {
        role: profiled(each, works[role], args.out, f"{model}.{role}") for role, each in models.items()
    }
    sizes = {
        role: largest_batch(each, works[role], args.long_tokens, args.max_batch)
        for role, each in models.items()
    }
    result["largest_batch"] = {
        **sizes,
        "new_tokens": args.long_tokens,
        "ratio": sizes["pmod"] / max(sizes["dense"], 1),
        "limited_by": "memory" if max(sizes.values()) < args.max_batch else "--max-batch",
    }
    del models
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if batch := min(sizes.values()):
        try:
            result[f"batch_{batch}"] = timed(model, replace(settings, batch=batch), args.device, args.repeats)
        except PmodError as error:
            result[f"batch_{batch}"] = {"error": str(error)}
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", help="default: llava-1.5-7b and llava-next-7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--long-tokens", type=int, default=256, help="decode steps in the search for a batch")
    parser.add_argument("--max-batch", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"versions": versions(), "arguments": {**vars(args), "out": str(args.out)}}
    for model in args.model or ["llava-1.5-7b", "llava-next-7b"]:
        results[model] = measure(model, args)
        (args.out / "gpu.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
