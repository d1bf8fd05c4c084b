"""``pmod generate``: one answer to one prompt, with or without a picture."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from pmod_cli.cli.app import app, examples
from pmod_cli.cli.options import AsJson, CacheKind, Device, Dtype, Kernels, MaxNewTokens, Prompt
from pmod_cli.extras import starting
from pmod_cli.output.console import emit_json, show_lines


@app.command(
    "generate",
    epilog=examples(
        'pmod generate llava-hf/llava-1.5-7b-hf --image cat.jpg --prompt "What is on the sofa?"',
        'pmod generate ./pmod-llava-1.5-7b --prompt "Name three primary colours." --json',
    ),
)
def generate_command(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id, dense or p-MoD.")],
    prompt: Prompt,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            "--image", help="A picture; may be repeated. <image> in the prompt says where each goes."
        ),
    ] = None,
    max_new_tokens: MaxNewTokens = 128,
    dtype: Dtype = "auto",
    device: Device = "auto",
    kernels: Kernels = "auto",
    cache: CacheKind = "dynamic",
    as_json: AsJson = False,
) -> None:
    """Answer one prompt, greedily."""
    with starting("generate"):
        from pmod_cli import generation
        from pmod_cli.checkpoints.load import check_source
        from pmod_cli.families.chat_templates import PLACEHOLDER
        from pmod_cli.generation import VisionLanguageModel
        from pmod_cli.output.errors import PmodError
        from pmod_cli.pictures import open_image

    check_source(model)
    images = image or []
    question = generation.Prompt(prompt, tuple(map(open_image, images)))
    if PLACEHOLDER in prompt and not images:
        raise PmodError(f"the prompt has {PLACEHOLDER}, and there is no picture", "--image names it")
    loaded = VisionLanguageModel.load(model, dtype=dtype, device=device, kernels=kernels, cache=cache)
    loaded.check_context(question)
    started = time.perf_counter()
    [answer] = loaded.generate([question], max_new_tokens=max_new_tokens)
    seconds = time.perf_counter() - started
    if not as_json:
        show_lines(answer.text)
        return
    emit_json(
        "generate",
        {
            "model": model,
            "image": str(images[0]) if len(images) == 1 else [str(path) for path in images] or None,
            "prompt": prompt,
            "answer": answer.text,
            "prompt_tokens": answer.prompt_tokens,
            "new_tokens": answer.new_tokens,
            "seconds": round(seconds, 4),
        },
    )
