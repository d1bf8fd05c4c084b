"""What goes on, on stderr: a bar that appears with the first step (until then an error is one line), or a spinner."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pmod_cli.output.console import stderr
from pmod_cli.output.text import plain


@contextmanager
def late_progress() -> Iterator[Callable[..., None]]:
    """Show a bar while the body runs.

    Yields:
        A function that moves the bar: what is being done, steps done, steps in all, and text to show after them, if
        any. Where something else is being done, a new bar takes the place of the old one.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, TextColumn("{task.fields[text]}", markup=False), console=stderr)
    task = bar.add_task("", total=None, text="")

    def show(label: str, done: int, total: int, text: str = "") -> None:
        if bar.tasks[0].description != (label := plain(label)):
            bar.reset(task, description=label)
        bar.start()
        bar.update(task, completed=done, total=total, text=plain(text))

    try:
        yield show
    finally:
        if bar.live.is_started:
            bar.stop()


@contextmanager
def working(label: str) -> Iterator[Callable[[str], None]]:
    """Show a spinner while the body runs; yields a function that says what is being done."""
    from rich.text import Text

    with stderr.status(label) as status:
        yield lambda text: status.update(Text(plain(text)))
