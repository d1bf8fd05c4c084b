"""A report as blocks, and the two forms it is written in: one HTML page that needs nothing else, and Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from jinja2 import Environment, PackageLoader

from pmod_cli import plots
from pmod_cli.output.tables import Table
from pmod_cli.output.text import html_text, markdown_text, relative_link


@dataclass(frozen=True)
class Text:
    """A paragraph; plain text, a link if it has a ``target`` relative to the report."""

    text: str
    target: str = ""


@dataclass(frozen=True)
class Notes:
    """A list of sentences."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Figure:
    """A drawing or a picture: ``png`` (or JPEG) for Markdown, and for the page if there is no ``svg``."""

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
    """One question that two models answered differently: (label, text) each line; PNG or JPEG files."""

    name: str
    title: str
    lines: Sequence[tuple[str, str]]
    pictures: Sequence[bytes]


Block = Text | Notes | Table | Figure | Tiles | Example


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


def to_html(document: Document) -> str:
    """The page; pictures are inside it. All text is escaped, but for the figures' own SVG."""
    return _render("page.html.jinja", document, css=plots.CSS, uri=plots.data_uri)


def to_markdown(document: Document, folder: str) -> tuple[str, dict[str, bytes]]:
    """The report as Markdown, and its pictures by file name; ``folder`` is theirs, relative to the Markdown file."""
    files: dict[str, bytes] = {}

    def picture(name: str, data: bytes) -> str:
        """Keep a picture, under a name that no other has; returns its path."""
        number, file = 1, f"{name}.{plots.kind_of(data)}"
        while files.get(file, data) != data:
            number += 1
            file = f"{name}-{number}.{plots.kind_of(data)}"
        files[file] = data
        return f"{folder}/{file}"

    return _render("page.md.jinja", document, picture=picture), files


def _render(template: str, document: Document, **values: Any) -> str:
    environment = Environment(
        loader=PackageLoader("pmod_cli.report", "."),
        autoescape=template.endswith(".html.jinja"),
        finalize=html_text,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"anchor": _anchor, "runs": _runs, "text": markdown_text, "link": relative_link}
    return environment.get_template(template).render(document=document, **values)


def _runs(blocks: Sequence[Block]) -> list[tuple[str, list[Block]]]:
    """Neighbours of one kind together, each run with the kind's name."""
    return [(kind, list(run)) for kind, run in groupby(blocks, lambda block: type(block).__name__)]


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z]+", "-", title.lower()).strip("-")
