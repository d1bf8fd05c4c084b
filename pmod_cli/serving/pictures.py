"""Where a request's pictures may come from: out of the request itself, and what the one who serves allows."""

from __future__ import annotations

import base64
import binascii
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from PIL import Image

from pmod_cli.output.errors import PmodError, first_line
from pmod_cli.pictures import LARGEST, PictureError, open_image

_SECONDS = 30
"""How long a download may be silent."""


@dataclass(frozen=True)
class PictureSources:
    """What may be read beside ``data:`` URLs.

    Attributes:
        folder: Files in it, links followed; None for no files.
        fetch: Whether http and https URLs are fetched.
    """

    folder: Path | None = None
    fetch: bool = False

    def open(self, url: str, most: int | None = None) -> Image.Image:
        """The picture at an ``image_url``, as `open_image` gives it; else a `PmodError`."""
        scheme = url.split(":", 1)[0].lower() if ":" in url else ""
        if scheme == "data":
            return open_image(_of_data(url), "in the request", most)
        name = url[:200]
        if scheme in ("http", "https"):
            if not self.fetch:
                raise PictureError(name, "this server fetches no URLs; send a data: URL (--fetch allows it)")
            return open_image(_download(url, name), name, most)
        if scheme not in ("", "file"):
            raise PictureError(name, "the URL is neither data:, file:, http: nor https:")
        return open_image(self._inside(url, name), name, most)

    def _inside(self, url: str, name: str) -> Path:
        if self.folder is None:
            raise PictureError(
                name, "this server reads no files; send a data: URL (--images allows a folder)"
            )
        folder = self.folder.resolve()
        try:
            path = unquote(urlsplit(url).path) if url.lower().startswith("file:") else url
            found = (folder / path).resolve()
        except (OSError, ValueError, RuntimeError) as error:
            raise PictureError(name, first_line(error)) from None
        if not found.is_relative_to(folder):
            raise PictureError(name, "it is not in the folder that this server may read")
        return found


def _of_data(url: str) -> bytes:
    header, _, data = url.partition(",")
    if not header.endswith(";base64"):
        raise PictureError("in the request", "a data: URL of a picture is data:image/png;base64,...")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise PictureError("in the request", f"not base64: {first_line(error)}") from None


def _download(url: str, name: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=_SECONDS) as answer:
            data: bytes = answer.read(LARGEST + 1)
    except Exception as error:  # whatever a stranger's server leads urllib into
        raise PictureError(name, first_line(error)) from None
    if len(data) > LARGEST:
        raise PmodError(f"image {name} is larger than {LARGEST:,} bytes")
    return data
