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
        'pmod generate ./pmod-qwen2.5-vl-3b --video goal.mp4 --prompt "Who scores?"',
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
    video: Annotated[
        list[Path] | None,
        typer.Option("--video", help="A video; may be repeated. <video> in the prompt says where each goes."),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(
            "--frames",
            min=2,
            max=1024,
            show_default="32",
            help="Seen of each video, evenly spaced; 2 or more, as Qwen's models see them in pairs.",
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
        from pmod_cli import prompts
        from pmod_cli.checkpoints.load import check_source, read_config
        from pmod_cli.families import families_with_videos, find_family
        from pmod_cli.families.chat_templates import PLACEHOLDER, VIDEO_PLACEHOLDER
        from pmod_cli.generation import VisionLanguageModel
        from pmod_cli.output.errors import PmodError
        from pmod_cli.pictures import open_image
        from pmod_cli.videos import FRAMES, open_video

    check_source(model)
    images, videos = image or [], video or []
    for place, given, what, option in (
        (PLACEHOLDER, images, "picture", "--image"),
        (VIDEO_PLACEHOLDER, videos, "video", "--video"),
    ):
        if place in prompt and not given:
            raise PmodError(f"the prompt has {place}, and there is no {what}", f"{option} names it")
    if videos and not find_family(read_config(model).model_type, unlisted=True).videos:
        raise PmodError("the model takes no videos", families_with_videos())
    if frames and not videos:
        raise PmodError("--frames is of a video, and there is none", "--video names it")
    clips = tuple(open_video(path, frames or FRAMES) for path in videos)
    question = prompts.Prompt(prompt, tuple(map(open_image, images)), clips)
    loaded = VisionLanguageModel.load(model, dtype=dtype, device=device, kernels=kernels, cache=cache)
    started = time.perf_counter()
    inputs = loaded.encode([question])
    loaded.check_context(inputs["input_ids"].shape[1])
    [answer] = loaded.answer(inputs, max_new_tokens=max_new_tokens)
    seconds = time.perf_counter() - started
    if not as_json:
        show_lines(answer.text)
        return
    emit_json(
        "generate",
        {
            "model": model,
            "image": _named(images),
            "video": _named(videos),
            "prompt": prompt,
            "answer": answer.text,
            "prompt_tokens": answer.prompt_tokens,
            "new_tokens": answer.new_tokens,
            "seconds": round(seconds, 4),
        },
    )


def _named(paths: list[Path]) -> str | list[str] | None:
    return str(paths[0]) if len(paths) == 1 else [str(path) for path in paths] or None
