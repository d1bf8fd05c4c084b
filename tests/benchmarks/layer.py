"""One Mixture-of-Depths layer against the dense layer on all tokens and on the kept tokens alone.

Variants alternate in one process; medians; ratios are what to quote. Run::

    python tests/benchmarks/layer.py --json
    python tests/benchmarks/layer.py --device cuda --dtype bfloat16 --hidden 4096 --heads 32 --intermediate 11008
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from pmod_cli.modeling.decoders import MoDLlamaDecoderLayer
from pmod_cli.modeling.plan import RoutingPlan
from pmod_cli.modeling.schedule import kept_tokens
from pmod_cli.modeling.settings import MoDConfig


def timed(function: Callable[[], Any], device: str) -> float:
    """Seconds of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def variants(args: argparse.Namespace, backward: bool) -> dict[str, Callable[[], Any]]:
    """The three things to time."""
    dtype = getattr(torch, args.dtype)
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    with torch.device(args.device):
        dense = LlamaDecoderLayer(config, 0).to(dtype)
        layer: Any = MoDLlamaDecoderLayer(config, 0)
        layer.add_router(args.hidden, MoDConfig([args.ratio]), args.ratio)
        layer = layer.to(dtype)
        torch.nn.init.normal_(layer.router.weight, std=0.02)
        tokens = args.vision + args.text
        hidden = torch.randn(1, tokens, args.hidden, dtype=dtype, requires_grad=backward)
        vision = torch.zeros(1, tokens, dtype=torch.bool)
        vision[:, 30 : 30 + args.vision] = True
        kept = args.text + kept_tokens(args.vision, args.ratio)
        short = hidden[:, :kept].detach().clone().requires_grad_(backward)
        rope = LlamaRotaryEmbedding(config)
        full_rope = rope(hidden, position_ids=torch.arange(tokens)[None])
        short_rope = rope(short, position_ids=torch.arange(kept)[None])
    plan = RoutingPlan.from_counts(vision, None, [args.vision], [tokens], [args.ratio])

    def run(module: Any, inputs: torch.Tensor, **kwargs: Any) -> Callable[[], Any]:
        def call() -> None:
            with torch.set_grad_enabled(backward):
                output = module(inputs, **kwargs)
                if backward:
                    output.sum().backward()

        return call

    return {
        "dense": run(dense, hidden, position_embeddings=full_rope),
        "mod": run(layer, hidden, position_embeddings=full_rope, routing_plan=plan),
        "bound": run(dense, short, position_embeddings=short_rope),
    }


def measure(args: argparse.Namespace, backward: bool) -> dict[str, float]:
    """Medians in milliseconds, and the ratios to quote (medians of the ratios round by round)."""
    calls = variants(args, backward)
    for call in calls.values():
        for _ in range(3):
            call()
    rounds = [{name: timed(call, args.device) for name, call in calls.items()} for _ in range(args.repeats)]
    result = {f"{name}_ms": 1e3 * statistics.median(r[name] for r in rounds) for name in calls}
    for above, below in (("mod", "bound"), ("mod", "dense"), ("bound", "dense")):
        result[f"{above}/{below}"] = statistics.median(r[above] / r[below] for r in rounds)
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--intermediate", type=int, default=2752)
    parser.add_argument("--vision", type=int, default=576)
    parser.add_argument("--text", type=int, default=124)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results = []
    for ratio in (0.5, 0.85, 0.15):
        for backward in (False, True):
            args.ratio = ratio
            results.append({"ratio": ratio, "backward": backward, **measure(args, backward)})
    if args.json:
        print(json.dumps({"arguments": vars(args), "torch": torch.__version__, "results": results}, indent=2))
        return
    for row in results:
        print(
            "  ".join(
                f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}"
                for key, value in row.items()
            )
        )


if __name__ == "__main__":
    main()
