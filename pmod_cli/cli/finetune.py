"""``pmod finetune``: train a checkpoint on LLaVA data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pmod_cli.cli.app import app, examples
from pmod_cli.cli.options import AsJson, Images, Overrides, RecipeName
from pmod_cli.devices import check_launch, is_main_process
from pmod_cli.extras import require_if_installed, starting
from pmod_cli.output.console import emit_json, show_lines, stderr, tell
from pmod_cli.output.progress import late_progress
from pmod_cli.output.tables import Table


@app.command(
    "finetune",
    epilog=examples(
        "pmod finetune ./start --data mix665k.json --images data --output ./tuned --recipe llava-1.5-7b",
        "pmod finetune ./start --data mix665k.json --images data --output ./tuned --recipe llava-1.5-7b --resume",
        "pmod finetune ./start-next --data lmms-lab/LLaVA-NeXT-Data --output ./tuned --recipe llava-next-7b",
        "torchrun --nproc_per_node 8 -m pmod_cli finetune ./start --data mix665k.json --images data --output ./tuned",
    ),
)
def finetune_command(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id, dense or p-MoD.")],
    data: Annotated[
        str,
        typer.Option(
            "--data", help="LLaVA JSON or JSONL; or a datasets folder or hub id with an image column."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", help="The new checkpoint.")],
    images: Images = None,
    recipe: RecipeName = None,
    settings: Overrides = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from the last complete checkpoint in OUTPUT.training, if any."),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace OUTPUT; start an unfinished run anew.")
    ] = False,
    merge: Annotated[bool, typer.Option("--merge", help="Fold LoRA into the weights at the end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune on LLaVA conversations: language model, projector and routers; the vision tower is frozen."""
    from pmod_cli.recipe import default_recipe, load_recipe

    check_launch()
    chosen = load_recipe(recipe, settings or ()) if recipe else default_recipe(settings or ())
    with starting("finetune"):
        require_if_installed("peft")  # transformers' Trainer imports it wherever it is
        from transformers.utils import logging

        from pmod_cli.training.finetune import finetune
        from pmod_cli.training.monitor import progress_text

    logging.disable_progress_bar()  # one bar is enough
    with late_progress() as show:
        result = finetune(
            model,
            data,
            images,
            output,
            recipe=chosen,
            resume=resume,
            force=force,
            progress=lambda done, total, latest: show("train", done, total, progress_text(latest)),
            announce=_announce,
            merge_lora=merge,
        )
    if not is_main_process():
        return
    if as_json:
        emit_json("finetune", result)
        return
    losses = [f"{loss:.4f}" for loss in (result["first_loss"], result["final_loss"]) if loss is not None]
    show_lines(
        f"{result['output']}: {result['steps']} steps, loss {' -> '.join(losses)}, "
        f"{result['seconds']:.0f} s, {len(result['bad_samples'])} bad samples"
    )


def _announce(parts: list[dict[str, Any]], memory: dict[str, Any]) -> None:
    from pmod_cli.training.memory import memory_text

    rows = [[part["part"], f"{part['trained']:,}", f"{part['frozen']:,}"] for part in parts]
    stderr.print(Table("Parameters", ("part", "trained", "frozen"), rows).to_rich())
    tell(memory_text(memory))
