"""The look of every picture and page: colours that everyone can tell apart, in print, in light and in dark mode.

matplotlib is imported when a figure is made, not before.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmod_cli.extras import require
from pmod_cli.output.files import check_output, write_file
from pmod_cli.output.marks import TAG
from pmod_cli.output.text import plain

if TYPE_CHECKING:
    from PIL.Image import Image

# Grey and colours of Okabe and Ito (2008): told apart by every kind of colour vision, and in grey.
DENSE, PMOD = "#8C8C8C", "#0072B2"
COLOURS = {"dense": DENSE, "pmod": PMOD}
NAMES = {"dense": "dense", "pmod": "p-MoD"}
SERIES = (PMOD, "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", DENSE)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, FAINT, LINE = "#1F2328", "#5F6770", "#E3E6E9"
HEAT = "viridis"
"""Colour map of counts: its lightness rises evenly, so it survives a grey print."""

DIM, DIM_SHARE = 0.42, 0.75
"""A dropped patch is mixed with this grey by this share."""

_RC = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor"), INK),
    **dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color", "axes.edgecolor"), FAINT),
    **dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize"), 9),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), 8),
    "legend.fontsize": 8.5,
    "text.parse_math": False,  # a dollar sign in a name is one
    "legend.frameon": False,
    "figure.titlesize": 10.5,
    "figure.titleweight": "bold",
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "savefig.facecolor": "white",
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
}

CSS = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
"""What every page begins with; pages use its variables, so that both modes follow from it."""

_THEMED = {INK: "--ink", FAINT: "--faint", LINE: "--line", DENSE: "--dense", PMOD: "--pmod"}


@contextmanager
def look() -> Iterator[None]:
    """The style as matplotlib's settings; whatever is drawn or written within (or in a function it decorates) has it.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib")
    import matplotlib

    with matplotlib.rc_context(_RC):
        yield


def figure(rows: int, columns: int, inches: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """A figure of ``inches`` (width, height), and its axes [rows, columns]; ``options`` are those of ``subplots``.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    with look():
        from matplotlib.figure import Figure

        drawn = Figure(figsize=inches, layout="constrained")
        axes = drawn.subplots(rows, columns, squeeze=False, **options)
        for axis in axes.flat:
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(axis="y")
    return drawn, axes


def retention_bars(axis: Any, ratios: Sequence[float | None], shares: Sequence[float]) -> Any:
    """Bars of the share of vision tokens that each layer keeps, grey where it is dense (the ratio is None)."""
    colours = [DENSE if ratio is None else PMOD for ratio in ratios]
    bars = axis.bar(range(len(ratios)), [100 * share for share in shares], 0.72, color=colours)
    axis.set(xlabel="decoder layer", ylabel="vision tokens kept, %", xlim=(-0.7, len(ratios) - 0.3))
    axis.set(ylim=(0, 112), yticks=[0, 50, 100], xticks=range(0, len(ratios), math.ceil(len(ratios) / 16)))
    return bars


def check_target(path: Path, force: bool = False, inputs: Sequence[str | Path] = ()) -> None:
    """Refuse a place where no picture can be written.

    Raises:
        MissingExtraError: matplotlib is not installed.
        PmodError: See `check_output`.
    """
    require("matplotlib")
    check_output(path, "a picture", (".png", ".pdf", ".svg"), force, inputs)


def save(drawn: Any, path: Path, *, force: bool = True, **how: Any) -> None:
    """Write a figure, in the format that the suffix says and as `render` takes it; a broken run leaves no half picture.

    Raises:
        PmodError: See `check_target`.
    """
    check_target(path, force)
    write_file(path, render(drawn, path.suffix, **how), force=force)


def render(drawn: Any, suffix: str, *, title: str = "", program: str = "pmod", dpi: int = 160) -> bytes:
    """A figure as the contents of a file.

    Args:
        drawn: The figure.
        suffix: The format (.png, .pdf, .svg).
        title: Kept in a PNG's metadata.
        program: Likewise; `pmod report` finds the pictures of `pmod visualize` by it.
        dpi: Pixels per inch.
    """
    kind = suffix.removeprefix(".").lower()
    metadata = {
        "png": {"Software": program, "Title": title, "Comment": TAG},
        "pdf": {"Creator": TAG},
        "svg": {"Description": TAG},
    }
    with look():
        buffer = io.BytesIO()
        drawn.savefig(buffer, format=kind, dpi=dpi, metadata=metadata[kind])
    return buffer.getvalue()


def encode(picture: Image, longest: int, lossless_pixels: int) -> bytes:
    """A picture for a page, its longer side at most ``longest``: PNG up to so many pixels, else JPEG."""
    picture = picture.convert("RGB")
    picture.thumbnail((longest, longest))
    buffer = io.BytesIO()
    if picture.width * picture.height <= lossless_pixels:
        picture.save(buffer, "PNG", optimize=True)
    else:
        picture.save(buffer, "JPEG", optimize=True, quality=90)
    return buffer.getvalue()


def kind_of(data: bytes) -> str:
    """``png`` or ``jpeg``."""
    return "png" if data.startswith(b"\x89PNG") else "jpeg"


def data_uri(data: bytes) -> str:
    """A PNG or JPEG file as text to stand in a page."""
    return f"data:image/{kind_of(data)};base64,{base64.b64encode(data).decode()}"


def inline_svg(drawn: Any, label: str) -> str:
    """A figure as SVG to stand in a page: its ink and the two models' colours follow the page's mode.

    Args:
        drawn: The figure.
        label: What a screen reader says.
    """
    label = plain(label)
    with look():
        import matplotlib

        buffer = io.StringIO()
        # Ids of clip paths and markers are hashes of this, and a page holds several figures.
        with matplotlib.rc_context({"svg.hashsalt": label}):
            drawn.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r' id="[a-zA-Z.]+_?\d+"(?=>)', "", text)
    for colour, variable in _THEMED.items():
        text = re.sub(colour, f"var({variable})", text, flags=re.I)
    text = re.sub(r"font: (\S+) '[^']*'[^;\"]*", r"font: \1 system-ui, sans-serif", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)
