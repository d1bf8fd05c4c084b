"""A report as blocks, and the two forms it is written in: one HTML page that needs nothing else, and Markdown."""

from __future__ import annotations

import base64
import html
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pmod_cli.output import plots as style


@dataclass(frozen=True)
class Text:
    """A paragraph; plain text."""

    text: str


@dataclass(frozen=True)
class Notes:
    """A list of sentences."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: Stands above; may be empty.
        header: Column names.
        rows: Cells; a row of one cell is a heading.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """A drawing or a picture.

    Attributes:
        name: Of its file beside the Markdown, without suffix.
        caption: Stands below.
        png: For Markdown, and for the page if there is no ``svg``.
        svg: For the page.
    """

    name: str
    caption: str
    png: bytes
    svg: str | None = None


@dataclass(frozen=True)
class Tiles:
    """A few figures to see first: each a number in words, what it is, and a word of explanation."""

    tiles: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Example:
    """One question that two models answered differently.

    Attributes:
        name: Of its picture's file.
        title: Which sample of which task.
        lines: (label, text) each.
        pictures: PNG or JPEG files.
    """

    name: str
    title: str
    lines: Sequence[tuple[str, str]]
    pictures: Sequence[bytes]


@dataclass(frozen=True)
class Link:
    """Another page, by a path relative to the report."""

    text: str
    target: str


Block = Text | Notes | Table | Figure | Tiles | Example | Link


@dataclass
class Section:
    """Blocks under a heading."""

    title: str
    blocks: list[Block] = field(default_factory=list)


@dataclass
class Document:
    """A whole report."""

    title: str
    subtitle: str
    sections: list[Section]


_CSS = """
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; padding: 0; margin: .8rem 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .9rem; margin: 1rem 0; }
.tiles b { display: block; font-size: 1.7rem; line-height: 1.2; color: var(--pmod); }
.tiles span { display: block; font-weight: 600; }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: .9rem; margin: .8rem 0; }
.examples img { max-height: 11rem; border-radius: 4px; background: #fff; border: 1px solid var(--line); }
.examples h3 { margin: 0 0 .4rem; font-size: .9rem; }
dl { display: grid; grid-template-columns: auto 1fr; gap: .1rem .7rem; margin: .5rem 0 0; font-size: .9rem; }
dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; }
figure, .examples article, tr { break-inside: avoid; }
figure img { background: #fff; border: 1px solid var(--line); border-radius: 6px; padding: .4rem; }
caption { text-align: left; font-weight: 600; padding: .6rem 0 .2rem; }
"""


def to_html(document: Document) -> str:
    """The page; pictures are inside it."""
    ids = [re.sub(r"[^a-z]+", "-", section.title.lower()).strip("-") for section in document.sections]
    links = "".join(
        f'<li><a href="#{anchor}">{html.escape(section.title)}</a></li>'
        for anchor, section in zip(ids, document.sections, strict=True)
    )
    body = "".join(
        f'<section id="{anchor}"><h2>{html.escape(section.title)}</h2>{_html_blocks(section.blocks)}</section>\n'
        for anchor, section in zip(ids, document.sections, strict=True)
    )
    title, subtitle = html.escape(document.title), html.escape(document.subtitle)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{title}</title>\n<style>{style.CSS}{_CSS}</style>\n</head>\n<body>\n<header><h1>{title}</h1>"
        f'<p class="faint">{subtitle}</p></header>\n<nav class="screen" aria-label="Sections"><ul>{links}</ul></nav>\n'
        f"<main>\n{body}</main>\n</body>\n</html>\n"
    )


def _html_blocks(blocks: Sequence[Block]) -> str:
    parts: list[str] = []
    for index, block in enumerate(blocks):
        if isinstance(block, Example):
            if not (index and isinstance(blocks[index - 1], Example)):
                parts.append('<div class="examples">')
            parts.append(_html_example(block))
            if index + 1 == len(blocks) or not isinstance(blocks[index + 1], Example):
                parts.append("</div>")
        else:
            parts.append(_html_block(block))
    return "".join(parts)


def _html_block(block: Block) -> str:
    if isinstance(block, Text):
        return f"<p>{html.escape(block.text)}</p>"
    if isinstance(block, Notes):
        lines = "".join(f"<li>{html.escape(line)}</li>" for line in block.lines)
        return f'<ul class="small faint">{lines}</ul>'
    if isinstance(block, Link):
        return f'<p><a href="{html.escape(block.target)}">{html.escape(block.text)}</a></p>'
    if isinstance(block, Tiles):
        cards = "".join(
            f'<div class="card"><b>{html.escape(number)}</b><span>{html.escape(what)}</span>'
            f'<small class="faint">{html.escape(why)}</small></div>'
            for number, what, why in block.tiles
        )
        return f'<div class="tiles">{cards}</div>'
    if isinstance(block, Figure):
        drawing = block.svg or f'<img src="{_uri(block.png)}" alt="{html.escape(block.caption)}">'
        return f"<figure>{drawing}<figcaption>{html.escape(block.caption)}</figcaption></figure>"
    assert isinstance(block, Table)
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in block.header)
    rows = "".join(_html_row(row, len(block.header)) for row in block.rows)
    caption = f"<caption>{html.escape(block.title)}</caption>" if block.title else ""
    return f'<div class="scroll"><table>{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _html_row(row: Sequence[str], width: int) -> str:
    if len(row) == 1:
        return f'<tr class="part"><td colspan="{width}">{html.escape(row[0])}</td></tr>'
    cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
    return f"<tr>{cells}</tr>"


def _html_example(example: Example) -> str:
    pictures = "".join(f'<img src="{_uri(data)}" alt="picture of the question">' for data in example.pictures)
    lines = "".join(
        f"<dt>{html.escape(label)}</dt><dd>{html.escape(text)}</dd>" for label, text in example.lines
    )
    return f'<article class="card"><h3>{html.escape(example.title)}</h3>{pictures}<dl>{lines}</dl></article>'


def _uri(data: bytes) -> str:
    return f"data:image/{'png' if _is_png(data) else 'jpeg'};base64,{base64.b64encode(data).decode()}"


def _is_png(data: bytes) -> bool:
    return data.startswith(b"\x89PNG")


def to_markdown(document: Document, folder: str) -> tuple[str, dict[str, bytes]]:
    """The report as Markdown.

    Args:
        document: The report.
        folder: Of the pictures, relative to the Markdown file.

    Returns:
        The text, and the pictures by file name.
    """
    files: dict[str, bytes] = {}
    parts = [f"# {_plain(document.title)}", _plain(document.subtitle)]

    def picture(name: str, data: bytes, caption: str) -> str:
        suffix, number = "png" if _is_png(data) else "jpg", 1
        file = f"{name}.{suffix}"
        while files.get(file, data) != data:  # another picture of that name
            number += 1
            file = f"{name}-{number}.{suffix}"
        files[file] = data
        return f"![{_plain(caption)}]({folder}/{file})"

    for section in document.sections:
        parts.append(f"## {_plain(section.title)}")
        for block in section.blocks:
            if isinstance(block, Text):
                parts.append(_plain(block.text))
            elif isinstance(block, Notes):
                parts.append("\n".join(f"- {_plain(line)}" for line in block.lines))
            elif isinstance(block, Link):
                parts.append(f"[{_plain(block.text)}]({block.target})")
            elif isinstance(block, Tiles):
                parts.append(
                    "\n".join(
                        f"- **{_plain(number)}** {_plain(what)} ({_plain(why)})"
                        for number, what, why in block.tiles
                    )
                )
            elif isinstance(block, Figure):
                parts.append(f"{picture(block.name, block.png, block.caption)}\n\n*{_plain(block.caption)}*")
            elif isinstance(block, Table):
                parts.append(_markdown_table(block))
            else:
                shown = [
                    picture(f"{block.name}-{index}", data, block.title)
                    for index, data in enumerate(block.pictures)
                ]
                lines = [f"- {_plain(label)}: {_plain(text)}" for label, text in block.lines]
                parts.append("\n\n".join([f"**{_plain(block.title)}**", *shown, "\n".join(lines)]))
    return "\n\n".join(parts) + "\n", files


def _markdown_table(table: Table) -> str:
    width = len(table.header)
    rows = [[_plain(name) for name in table.header], ["---", *["---:"] * (width - 1)]]
    for row in table.rows:
        cells = [f"**{_plain(row[0])}**"] if len(row) == 1 else [_plain(cell) for cell in row]
        rows.append([*cells, *[""] * (width - len(cells))])
    text = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"**{_plain(table.title)}**\n\n{text}" if table.title else text


def _plain(text: str) -> str:
    """Text that Markdown takes as it stands, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>|])", r"\\\1", " ".join(text.split()))


def relative(target: Path, folder: Path) -> str:
    """A link from a folder to a file."""
    return Path(os.path.relpath(target, folder)).as_posix()
