"""The one way to open a picture: what a viewer shows, as 8-bit RGB.

Training, checking, answering, evaluating, drawing and profiling all see the same pixels.
"""

from __future__ import annotations

import contextlib
import io
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFile, ImageOps

from pmod_cli.output.errors import PmodError, first_line
from pmod_cli.output.reading import check_regular

MAX_ASPECT = 100
"""Longest side over shortest. Processors that scale the short side to a fixed length would need gigabytes beyond it."""

LARGEST = 2**29
"""Bytes of a picture's file."""
MOST_PIXELS = 110_000_000
"""Of one picture; a camera of 108 megapixels has fewer, and each takes 8 bytes on its way into a processor."""

_ROWS = 256  # worked on at once, where they take more on the way
_UPRIGHT = 1
_ORIENTATION = 0x0112
_LYING = range(5, 9)
_TURNED = "turned by its EXIF orientation"
_SINGLE_COLOUR = "suspicious: a single colour"


class Facts(NamedTuple):
    """What `open_image` would find: the size as `as_rgb` gives it, and the notes."""

    width: int
    height: int
    notes: tuple[str, ...]


class PictureError(PmodError):
    """A picture that cannot be used; ``reason`` is the message without the picture's name."""

    def __init__(self, name: object, reason: str) -> None:
        super().__init__(f"cannot read image {name}: {reason}")
        self.reason = reason


def open_image(source: str | Path | bytes, name: object = None, most: int | None = None) -> Image.Image:
    """Read a picture, from a file or from a file's bytes, as `as_rgb` gives it.

    Its ``info["notes"]`` say what was converted or is suspicious. A `PictureError` calls it ``name``. One that has more
    than ``most`` pixels, as its header says, is refused before it is decoded.
    """
    name = source if name is None else name
    if not isinstance(source, bytes):
        if is_url(source):
            raise PictureError(name, "a URL, and pictures are read from files; download it first")
        try:
            check_regular(Path(source), LARGEST, name)
            source = Path(source).read_bytes()
        except FileNotFoundError:
            raise PmodError(f"no image file {name}", "check the path") from None
        except (OSError, ValueError) as error:
            raise PictureError(name, getattr(error, "strerror", None) or first_line(error)) from error
    with _errors_named(name), _EAR.listening() as heard, Image.open(io.BytesIO(_whole(source))) as image:
        if most is not None and image.width * image.height > most:
            size = f"{image.width} x {image.height}"
            raise PictureError("", f"{size} pixels, and {most:,} are left to it; scale pictures down")
        picture = as_rgb(image)
    picture.info["notes"] += _sayings(heard)
    return picture


def examine_image(source: bytes, name: object) -> Facts:
    """Find what is wrong with a picture as `open_image` does, in half the time for a JPEG; may be called in threads.

    A JPEG is decoded to an eighth of its size. That reads the whole file, so one that is cut short is found as well.
    """
    with _errors_named(name), _EAR.listening() as heard, Image.open(io.BytesIO(_whole(source))) as image:
        width, height = image.size
        _refuse_extreme(width, height)
        lying = _orientation(image) in _LYING
        smaller = image.draft(None, (1, 1)) is not None
        notes = notes_of(as_rgb(image))
    if lying and _TURNED in notes:
        width, height = height, width
    if smaller and _SINGLE_COLOUR in notes:  # a fine pattern is lost in the small picture
        notes = notes_of(open_image(source, name))
    return Facts(width, height, tuple(dict.fromkeys([*notes, *_sayings(heard)])))


def _whole(source: bytes) -> bytes:
    if not source:
        raise PictureError("", "the file is empty")
    refuse_cut_pictures()
    return source


@contextlib.contextmanager
def _errors_named(name: object) -> Iterator[None]:
    """Make a `PictureError` of whatever opening a picture raises."""
    try:
        yield
    except Image.UnidentifiedImageError:
        raise PictureError(name, "it is not an image that Pillow can read") from None
    except PictureError as error:
        raise PictureError(name, error.reason) from None
    except Exception as error:  # Pillow's decoders raise whatever a broken file leads them into
        raise PictureError(name, first_line(error)) from error


def refuse_cut_pictures() -> None:
    """Have Pillow raise an error for a picture that is cut short, as it does by default.

    Importing lmms-eval switches that off for the whole process, and Pillow fills up cut pictures with grey.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = False


def is_url(name: object) -> bool:
    """Whether a picture's name is an address."""
    return str(name).lower().startswith(("http:", "https:", "s3:", "gs:", "data:"))


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture as viewers show it, in 8-bit RGB; one that already is so comes back as it is.

    The EXIF orientation is applied. Greyscale of more than 8 bits is scaled: 16-bit by its range, integers and floats
    by the smallest of 1 (floats), 255 and 65535 that holds their values, else from their least to their greatest.
    What is transparent lies on white. An animation is its first frame. ``info["notes"]`` lists what was done.

    Raises:
        PictureError: One side is more than `MAX_ASPECT` times the other, it has more than `MOST_PIXELS`, or Pillow
            knows no way to RGB.
    """
    if "notes" in image.info and image.mode == "RGB":
        return image
    _refuse_extreme(*image.size)
    given, notes = image, list[str]()
    kind, animated = image.format, getattr(image, "is_animated", False)
    if animated and kind != "MPO":  # a phone's MPO holds a second view or a preview
        notes.append("animation or several pages: the first is used")
    image = _upright(image, notes)
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image, kind, notes)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = _on_white(image, notes)
    if image.mode in ("CMYK", "LAB", "HSV", "YCbCr"):
        notes.append(f"{image.mode} colours converted")
    try:
        rgb = image.convert("RGB") if image.mode != "RGB" else image.copy() if image is given else image
    except ValueError as error:
        raise PictureError("", first_line(error)) from error
    bands: Any = rgb.getextrema()
    if all(low == high for low, high in bands):
        notes.append(_SINGLE_COLOUR)
    rgb.info = {"notes": notes}
    return rgb


def notes_of(image: Image.Image) -> list[str]:
    """What `as_rgb` did to a picture, and what is suspicious about it."""
    return list(image.info.get("notes", ()))


def _refuse_extreme(width: int, height: int) -> None:
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise PictureError("", f"{width} x {height}: one side is more than {MAX_ASPECT} times the other")
    if width * height > MOST_PIXELS:
        raise PictureError("", f"{width} x {height} are more than {MOST_PIXELS:,} pixels; scale it down")


def _orientation(image: Image.Image) -> int | None:
    """As EXIF has it, 1 if it says nothing; None if it cannot be read."""
    try:
        return image.getexif().get(_ORIENTATION, _UPRIGHT)
    except Exception:  # a broken EXIF block says nothing about the pixels
        return None


def _upright(image: Image.Image, notes: list[str]) -> Image.Image:
    turned = _orientation(image)
    try:
        upright = ImageOps.exif_transpose(image) if turned in range(2, 9) else image
    except Exception:
        turned, upright = None, image
    if turned is None:
        notes.append("suspicious: EXIF data that cannot be read; taken as upright")
    elif upright is not image:
        notes.append(_TURNED)
    return upright


def _to_8_bit(image: Image.Image, kind: str | None, notes: list[str]) -> Image.Image:
    values = np.nan_to_num(np.asarray(image), posinf=0, neginf=0)
    low, high = float(values.min()), float(values.max())
    sixteen_bit = image.mode.startswith("I;16") or (image.mode == "I" and kind == "PNG")
    whites = (65535,) if sixteen_bit else (1, 255, 65535) if image.mode == "F" else (255, 65535)
    white = next((white for white in whites if low >= 0 and high <= white), None)
    notes.append(
        f"{'16-bit' if sixteen_bit else 'float' if image.mode == 'F' else '32-bit'} greyscale scaled"
    )
    largest = float(white or high - low)
    if white and sixteen_bit and 0 < high < largest / 16:
        notes.append("suspicious: 16-bit greyscale that uses less than a sixteenth of its range")
    least, grey = 0 if white else low, np.empty(values.shape, np.uint8)
    for row, line in enumerate(values):  # not all at once, as each pixel takes 8 bytes meanwhile
        grey[row] = np.rint((line.astype(np.float64) - least) * (255 / (largest or 1)))
    return Image.fromarray(grey)


def _on_white(image: Image.Image, notes: list[str]) -> Image.Image:
    image = image if image.mode == "RGBA" else image.convert("RGBA")
    if image.getchannel("A").getextrema()[0] == 255:
        return image.convert("RGB")
    notes.append("transparency laid on white")
    rgb = Image.new("RGB", image.size)
    for top in range(0, image.height, _ROWS):
        part = image.crop((0, top, image.width, min(top + _ROWS, image.height)))
        rgb.paste(Image.alpha_composite(Image.new("RGBA", part.size, "white"), part).convert("RGB"), (0, top))
    return rgb


def _sayings(heard: list[Any]) -> list[str]:
    """What Pillow warned of, as notes."""
    ours = (each for each in heard if _from_pillow(each))
    return sorted({f"Pillow warns: {str(warning.message).splitlines()[0]}" for warning in ours})


class _Ear:
    """Hears warnings, each thread its own; `warnings.catch_warnings`, which it uses, is not made for threads."""

    def __init__(self) -> None:
        self._lock, self._listening, self._own = threading.Lock(), 0, threading.local()

    @contextlib.contextmanager
    def listening(self) -> Iterator[list[Any]]:
        """The list to which this thread's warnings are added."""
        heard: list[Any] = []
        before = getattr(self._own, "heard", None)
        with self._lock:
            self._listening += 1
            if self._listening == 1:
                self._caught = warnings.catch_warnings()
                self._caught.__enter__()
                self._others = warnings.showwarning
                warnings.simplefilter("always")
                warnings.showwarning = self._hear  # type: ignore[assignment]  # restored below
        self._own.heard = heard
        try:
            yield heard
        finally:
            self._own.heard = before
            with self._lock:
                self._listening -= 1
                if not self._listening:
                    self._caught.__exit__(None, None, None)

    def _hear(self, message: Any, category: Any, filename: str, *rest: Any) -> None:
        heard = getattr(self._own, "heard", None)
        if heard is None:
            self._others(message, category, filename, *rest)
        else:
            heard.append(warnings.WarningMessage(message, category, filename, *rest))


_EAR = _Ear()


def _from_pillow(warning: Any) -> bool:
    return "PIL" in Path(warning.filename).parts or issubclass(
        warning.category, Image.DecompressionBombWarning
    )
