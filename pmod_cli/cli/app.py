"""The Typer application and the entry point of the console script."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from pmod_cli import __version__
from pmod_cli.output.console import prepare_streams, report_error
from pmod_cli.output.errors import PmodError
from pmod_cli.output.signals import listening

app = typer.Typer(
    name="pmod",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Turn a LLaVA model into a Mixture-of-Depths model (p-MoD), fine-tune it, measure what it saves, evaluate it.",
    epilog="Try it without a GPU or network: [bold]pmod demo[/bold]",
)


def examples(*commands: str) -> str:
    """The end of a help text: commands that work, one on each line."""
    return "\n\n".join(["Examples:", *(f"  {command}" for command in commands)]).replace("[", r"\[")


def _version(value: bool) -> None:
    if value:
        typer.echo(f"pmod {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error too; anywhere in the line.")
    ] = False,
) -> None:
    try:
        Path.cwd()
    except FileNotFoundError:  # libraries end the program over it, with words of their own
        raise PmodError("the working folder is gone", "cd to one that is there") from None


@listening()
def main(argv: list[str] | None = None) -> None:
    """Run the command line (``sys.argv[1:]`` by default) and exit.

    The code is 0 if all is done, 1 if a gate was not met, 2 for bad input or environment, 130 after Ctrl-C,
    143 after SIGTERM.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    options = words[: words.index("--")] if "--" in words else words
    debug = "--debug" in options
    if debug:
        words.remove("--debug")
    # Whenever PEFT is imported, it warns about a kernel that only 4-bit weights on a CPU would use.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        prepare_streams()
        # Not standalone: typer would answer a mistake with a box instead of a line. It then returns the exit code of
        # ``typer.Exit``, and 130 on Ctrl-C.
        result = app(args=words, prog_name="pmod", standalone_mode=False)
        code = result if isinstance(result, int) else 0
        if code == 130:
            code = report_error(KeyboardInterrupt(), debug)
        sys.stdout.flush()  # while what goes wrong can still be told
        sys.exit(code)
    except SystemExit:
        raise
    except BaseException as error:  # Rust's panics are no Exceptions
        sys.exit(report_error(error, debug))
