"""``pmod finetune``: train a checkpoint on LLaVA data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pmod_cli.cli.app import app
from pmod_cli.cli.output import emit_json, stderr, stdout


@app.command("finetune")
def finetune_command(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id, dense or p-MoD.")],
    data: Annotated[Path, typer.Option("--data", help="LLaVA JSON or JSONL.")],
    images: Annotated[Path, typer.Option("--images", help="Folder that its image names are relative to.")],
    output: Annotated[Path, typer.Option("--output", help="The new checkpoint.")],
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Name of a shipped recipe, or a .yaml file.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key=value over the recipe, e.g. train.max_steps=10.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last complete checkpoint of OUTPUT.training.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace OUTPUT; start an unfinished run anew.")
    ] = False,
    merge: Annotated[bool, typer.Option("--merge", help="Fold LoRA into the weights at the end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    r"""Fine-tune on LLaVA conversations: language model, projector and routers; the vision tower is frozen.

    Examples:
      pmod finetune ./pmod-llava-1.5-7b --data mix665k.json --images data --output run --recipe llava-1.5-7b

      pmod finetune ./pmod-llava-1.5-7b --data mix665k.json --images data --output run --recipe llava-1.5-7b --resume

      torchrun --nproc_per_node 8 -m pmod_cli finetune ./pmod-llava-1.5-7b --data mix665k.json --images data \
        --output run --recipe llava-1.5-7b
    """
    from pmod_cli.recipe import default_recipe, load_recipe

    chosen = load_recipe(recipe, settings or ()) if recipe else default_recipe(settings or ())

    from pmod_cli.training.run import finetune

    with _Progress() as show:
        result = finetune(
            model,
            data,
            images,
            output,
            recipe=chosen,
            resume=resume,
            force=force,
            progress=show,
            announce_parts=_show_parts,
            merge_lora=merge,
        )
    if as_json:
        emit_json("finetune", result.to_dict())
        return
    stdout.print(
        f"{result.output}: {result.steps} steps, loss {result.first_loss:.4f} -> {result.final_loss:.4f}, "
        f"{result.seconds:.0f} s, {len(result.bad_samples)} bad samples",
        markup=False,
        soft_wrap=True,
    )


class _Progress:
    """A progress bar on stderr that the library's callback moves."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.bar = Progress(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=stderr,
        )
        self.task = self.bar.add_task("train", total=None, figures="")

    def __enter__(self) -> Any:
        return self._show

    def __exit__(self, *error: object) -> None:
        if self.bar.live.is_started:
            self.bar.stop()

    def _show(self, done: int, total: int, latest: dict[str, float]) -> None:
        names = (
            ("loss", "loss", ".4f"),
            ("grad_norm", "grad", ".2f"),
            ("learning_rate", "lr", ".2e"),
            ("samples_per_second", "samples/s", ".1f"),
            ("tokens_per_second", "tokens/s", ".0f"),
        )
        figures = "  ".join(f"{label} {latest[key]:{form}}" for key, label, form in names if key in latest)
        if "memory_bytes" in latest:
            figures += f"  {latest['memory_bytes'] / 2**30:.1f} GiB"
        self.bar.start()  # not before the first step: until then an error is one line and no more
        self.bar.update(self.task, completed=done, total=total, figures=figures)


def _show_parts(parts: list[Any]) -> None:
    from rich.table import Table

    table = Table("part", "trained", "frozen", title="Parameters")
    for column in table.columns[1:]:
        column.justify = "right"
    for part in parts:
        table.add_row(part.part, f"{part.trained:,}", f"{part.frozen:,}")
    stderr.print(table)
