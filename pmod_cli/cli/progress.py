"""A progress bar on stderr that appears with the first step: until then an error is one line and no more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pmod_cli.output.console import stderr


@contextmanager
def late_progress(label: str) -> Iterator[Callable[[int, int, str], None]]:
    """Show a bar while the body runs; it yields a function of steps done, steps in all, and text to show after them."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, TextColumn("{task.fields[text]}"), console=stderr)
    task = bar.add_task(label, total=None, text="")

    def show(done: int, total: int, text: str) -> None:
        bar.start()
        bar.update(task, completed=done, total=total, text=text)

    try:
        yield show
    finally:
        if bar.live.is_started:
            bar.stop()
