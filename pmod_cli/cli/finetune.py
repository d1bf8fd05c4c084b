"""``pmod finetune``: train a checkpoint on LLaVA data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pmod_cli.cli.app import app, examples
from pmod_cli.extras import require_if_installed, starting
from pmod_cli.output.console import emit_json, stderr, stdout

if TYPE_CHECKING:
    from pmod_cli.training.memory import MemoryEstimate
    from pmod_cli.training.parts import PartCount


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
    images: Annotated[
        Path | None, typer.Option("--images", help="Folder that a file's image names are relative to.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Name of a shipped recipe, or a .yaml file.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key=value over the recipe, e.g. train.max_steps=10.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on from the last complete checkpoint in OUTPUT.training; begin if there is none.",
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace OUTPUT; start an unfinished run anew.")
    ] = False,
    merge: Annotated[bool, typer.Option("--merge", help="Fold LoRA into the weights at the end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Fine-tune on LLaVA conversations: language model, projector and routers; the vision tower is frozen."""
    from pmod_cli.recipe import default_recipe, load_recipe

    chosen = load_recipe(recipe, settings or ()) if recipe else default_recipe(settings or ())

    with starting("finetune"):
        require_if_installed("peft")  # transformers' Trainer imports it wherever it is
        from transformers.utils import logging

        from pmod_cli.devices import is_main_process
        from pmod_cli.training.finetune import finetune

    logging.disable_progress_bar()  # one bar is enough

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
            announce=_announce,
            merge_lora=merge,
        )
    if not is_main_process():
        return
    if as_json:
        emit_json("finetune", result.to_dict())
        return
    losses = [f"{loss:.4f}" for loss in (result.first_loss, result.final_loss) if loss is not None]
    stdout.print(
        f"{result.output}: {result.steps} steps, loss {' -> '.join(losses)}, "
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


def _announce(parts: list[PartCount], memory: MemoryEstimate) -> None:
    from rich.table import Table

    table = Table("part", "trained", "frozen", title="Parameters")
    for column in table.columns[1:]:
        column.justify = "right"
    for part in parts:
        table.add_row(part.part, f"{part.trained:,}", f"{part.frozen:,}")
    stderr.print(table)
    amounts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
    }
    items = ", ".join(f"{name} {_gib(amount)}" for name, amount in amounts.items())
    available = "" if memory.available is None else f" of {_gib(memory.available)}"
    stderr.print(f"memory per device, at most about {_gib(memory.total)}{available}: {items}", soft_wrap=True)
    if not memory.fits:
        stderr.print("[bold]that will not fit[/bold]; what would lower it, each on top of the ones before:")
        for line in memory.advice:
            stderr.print(f"  {line}", markup=False, soft_wrap=True)


def _gib(amount: int) -> str:
    return f"{amount / 2**30:.2f} GiB"
