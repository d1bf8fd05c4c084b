"""Text from files, models and folders' names on its way out: it is shown as it is, never obeyed."""

from __future__ import annotations

import re
from urllib.parse import quote

_OBEYED = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal or browser obeys instead of showing it, or cannot write: control codes, changes of the writing
direction, halves of surrogate pairs. New lines and tabs are text."""


def plain(text: str) -> str:
    r"""Text for the console: what a terminal would obey is spelled out, ``\x1b``."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def html_text(value: object) -> object:
    """Text for an HTML page, whose template escapes it too (``autoescape``); `Environment`'s ``finalize``."""
    return plain(value) if type(value) is str else value  # not Markup, a subclass


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is, in one line; an address in it is no link."""
    return re.sub(
        r"([\\`*_{}\[\]<>|&#~!$]|:(?=//)|(?<=www)\.)", r"\\\1", plain(" ".join(text.split())), flags=re.I
    )


def relative_link(path: str) -> str:
    """A path relative to a page as a link of HTML or Markdown; a name such as ``javascript:x`` stays a name."""
    return quote(path.encode(errors="surrogateescape"))
