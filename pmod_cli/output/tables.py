"""A table of text: for the terminal and as Markdown. What stands in its cells is never taken for markup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pmod_cli.output.text import markdown_text, plain

if TYPE_CHECKING:
    from rich.table import Table as RichTable


@dataclass(frozen=True)
class Table:
    """A titled table.

    Attributes:
        title: What it shows; may be empty.
        header: Column names.
        rows: One list of cells per row; a row of one cell is a heading.
        left: How many columns are text, and stand on the left; the others are figures.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]] = ()
    left: int = 1

    def to_rich(self) -> RichTable:
        """For the terminal."""
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(title=Text(plain(self.title)) if self.title else None, title_justify="left")
        for index, name in enumerate(self.header):
            # Where the terminal is narrow the header wraps, figures do not.
            widest = max((len(plain(row[index])) for row in self.rows if len(row) > index), default=0)
            text = index < self.left
            table.add_column(Text(name), justify="left" if text else "right", min_width=widest, no_wrap=text)
        for row in self.rows:
            if len(row) == 1 and len(self.header) > 1:
                table.add_section()
                table.add_row(Text(plain(row[0]), style="bold"))
            else:
                table.add_row(*(Text(plain(cell)) for cell in row))
        return table

    def to_markdown(self) -> str:
        """For a README."""
        width = len(self.header)
        rule = ["---" if index < self.left else "---:" for index in range(width)]
        lines = [f"**{markdown_text(self.title)}**", ""] if self.title else []
        lines += [_line(list(map(markdown_text, self.header))), _line(rule)]
        for row in self.rows:
            cells = list(map(markdown_text, row))
            cells = [f"**{cells[0]}**"] if len(row) == 1 and width > 1 else cells
            lines.append(_line([*cells, *[""] * (width - len(cells))]))
        return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
