"""Options that mean the same in every command, defined once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_origin, get_type_hints

import typer
from typer.models import OptionInfo

Model = TypeVar("Model")

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]
Device = Annotated[str, typer.Option("--device", help="auto (a GPU if there is one), cpu, cuda, cuda:1 ...")]
Dtype = Annotated[
    str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16; auto is float32 on a CPU.")
]
Kernels = Annotated[
    Literal["auto", "torch", "liger"],
    typer.Option(
        "--kernels", help="auto: fused ones on a GPU, liger-kernel's too if installed; torch: none."
    ),
]
CacheKind = Annotated[
    Literal["dynamic", "static"],
    typer.Option("--cache", help="static: fixed shapes, so that a GPU runs compiled decode steps."),
]
Revision = Annotated[str | None, typer.Option("--revision", help="Hub branch, tag or commit.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="key=value over the recipe, e.g. mod.floor=0.1; repeatable.")
]
RecipeName = Annotated[
    str | None,
    typer.Option("--recipe", help="Shipped recipe, or a .yaml file (default: the paper's settings)."),
]
Images = Annotated[
    Path | None, typer.Option("--images", help="Folder that the data's image names are relative to.")
]
Prompt = Annotated[str, typer.Option("--prompt", help="What to ask; the chat template is applied.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")]


def options_of(
    model: type[Model], /, **described: Any
) -> Callable[[Callable[[Model], None]], Callable[..., None]]:
    """Make a command of a function that takes one dataclass: each of its fields becomes an option.

    Names, types and defaults are the dataclass's; only help stands at the command.

    Args:
        model: A dataclass; a field without a default becomes a required option or argument.
        described: By field, in the order of ``--help``: the help text, a ``typer.Option`` or ``typer.Argument``, or one
            of the types above.
    """
    types = get_type_hints(model)

    def parameter(name: str, how: Any) -> inspect.Parameter:
        if isinstance(how, str):
            how = typer.Option(help=how)
        if isinstance(how, OptionInfo):
            # The name is spelled out, else typer adds --no-NAME to every switch.
            how.param_decls = how.param_decls or (f"--{name.replace('_', '-')}",)
        annotation = how if get_origin(how) is Annotated else Annotated[types[name], how]
        default = getattr(model, name, inspect.Parameter.empty)
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)

    def command_of(function: Callable[[Model], None]) -> Callable[..., None]:
        def command(**values: Any) -> None:
            function(model(**values))

        parameters = [parameter(name, how) for name, how in described.items()]
        command.__name__, command.__doc__ = function.__name__, function.__doc__
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
        return command

    return command_of
