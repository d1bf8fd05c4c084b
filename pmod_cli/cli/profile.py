"""``pmod profile``: FLOPs, KV cache, and with ``--latency`` real time, of p-MoD against its dense baseline."""

from __future__ import annotations

import typer

from pmod_cli.cli.app import app, examples
from pmod_cli.cli.options import AsJson, CacheKind, Device, Kernels, Overrides, options_of
from pmod_cli.extras import starting
from pmod_cli.profiling.options import ProfileOptions


@app.command(
    "profile",
    epilog=examples(
        "pmod profile llava-1.5-7b",
        "pmod profile --recipe llava-next-7b --convention paper",
        "pmod profile ./pmod-llava-1.5-7b --latency --device cuda --plot profile.png",
        "pmod profile llava-1.5-7b --max-flops-ratio 0.6 --max-kv-ratio 0.6 --json",
    ),
)
@options_of(
    ProfileOptions,
    model=typer.Argument(
        help="Checkpoint folder, hub id, config.json, or a name: llava-1.5-7b, llava-next-34b ..."
    ),
    recipe="How a dense MODEL becomes p-MoD (default: the paper's settings).",
    overrides=Overrides,
    baseline="auto (the same model, all layers dense), another model, or none.",
    image_size="WIDTHxHEIGHT in pixels; default: the size with the most vision tokens.",
    image="Take the size from this picture.",
    no_image="A prompt of text only.",
    text_tokens=typer.Option(min=1, help="Default 35 (30 in the paper's convention)."),
    new_tokens=typer.Option(min=1, help="Tokens to generate."),
    batch=typer.Option(min=1, help="Samples per batch."),
    dtype="float32, bfloat16 or float16; auto is bfloat16, or float32 to measure on a CPU.",
    logits="LM head at all prompt positions (as forward) or only the last (as generate).",
    counter="auto: fvcore if it is installed, else the closed formula.",
    convention="paper: count as the paper's table did.",
    latency="Measure time and memory too.",
    allow_pickle="With --latency: load .bin weights (with torch's weights_only reader).",
    device=Device,
    repeats=typer.Option(min=1, help="Measured runs."),
    kernels=Kernels,
    cache=CacheKind,
    sweep="One row per ratio, prompt length or batch size.",
    schedules="Compare schedules at equal mean retention.",
    compare="What changed between two --json files.",
    plot="Draw to this .png, .pdf or .svg file.",
    force="Overwrite the --plot file.",
    markdown="Print Markdown.",
    as_json=AsJson,
    max_flops_ratio="Exit 1 if the prefill-FLOPs ratio exceeds this.",
    max_kv_ratio="Exit 1 if the KV-cache ratio exceeds this.",
    max_prefill_ratio="Exit 1 if the prefill-time ratio exceeds this (this and the next three need --latency).",
    max_first_prefill_ratio="The same at prompt lengths not seen before.",
    max_decode_ratio="The same of the decode time.",
    max_operators_ratio="The same of the number of operators in a prefill.",
)
def profile_command(options: ProfileOptions) -> None:
    """Count what p-MoD saves against its dense baseline; measure it with --latency.

    Counting reads configs only: no weights, no GPU, and for the models known by name no network.
    """
    with starting("profile"):
        from pmod_cli.profiling.command import run
    run(options)
