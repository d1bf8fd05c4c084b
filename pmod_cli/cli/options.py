"""Options that mean the same in every command, defined once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]
Device = Annotated[str, typer.Option("--device", help="auto (a GPU if there is one), cpu, cuda, cuda:1 ...")]
Dtype = Annotated[
    str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16; auto is float32 on a CPU.")
]
Revision = Annotated[str | None, typer.Option("--revision", help="Hub branch, tag or commit.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="key=value over the recipe, e.g. mod.floor=0.1; repeatable.")
]
Images = Annotated[Path, typer.Option("--images", help="Folder that the data's image names are relative to.")]
Prompt = Annotated[str, typer.Option("--prompt", help="What to ask; the chat template is applied.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")]
