"""A progress bar on stderr that appears with the first step: until then an error is one line and no more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pmod_cli.output.console import stderr


@contextmanager
def late_progress() -> Iterator[Callable[..., None]]:
    """Show a bar while the body runs.

    Yields:
        A function that moves the bar: what is being done, steps done, steps in all, and text to show after them, if
        any. Where something else is being done, a new bar takes the place of the old one.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, TextColumn("{task.fields[text]}"), console=stderr)
    task = bar.add_task("", total=None, text="")

    def show(label: str, done: int, total: int, text: str = "") -> None:
        if bar.tasks[0].description != label:
            bar.reset(task, description=label)
        bar.start()
        bar.update(task, completed=done, total=total, text=text)

    try:
        yield show
    finally:
        if bar.live.is_started:
            bar.stop()
