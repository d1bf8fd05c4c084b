"""Where a sample's pictures are: in a folder of files, or in the image column of a `datasets` table.

A picture is opened only when a sample is asked for, in the loader's workers.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from pmod_cli.data.records import BadSample
from pmod_cli.output.errors import PmodError
from pmod_cli.output.files import check_regular
from pmod_cli.pictures import LARGEST, PictureError, open_image


class ImageFolder:
    """Files below one folder; a name never leads out of it.

    Args:
        folder: Names are relative to it. A folder linked into it counts as part of it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, name: str) -> Image.Image:
        """Decode a picture as RGB; `BadSample` as in `find` and in `decode`."""
        try:
            path = self.find(name)
            check_regular(path, LARGEST)
            content = path.read_bytes()
        except PmodError as error:
            raise BadSample("unreadable image", str(error)) from error
        except OSError as error:
            raise BadSample("unreadable image", f"{name}: {type(error).__name__}") from error
        return decode(content, name)

    def find(self, name: str) -> Path:
        """Where a picture is, without opening it; `BadSample` if it is not there or outside the folder."""
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise BadSample("path leaves the folder", name)
        path = self.folder / name
        try:
            path.lstat()
            outside = path.is_symlink() and not path.resolve().is_relative_to(self.folder.resolve())
            missing = not path.exists()
        except (FileNotFoundError, NotADirectoryError, ValueError):  # the last for a zero byte in the name
            raise BadSample("missing image", name) from None
        except (OSError, RuntimeError) as error:  # a name too long, a link to itself
            raise BadSample("unreadable image", f"{name}: {type(error).__name__}") from error
        if outside or missing:
            raise BadSample("path leaves the folder" if outside else "missing image", name)
        return path


class ImageColumn:
    """The column of images, or lists of them, of a `datasets` table; a picture's name is ``ROW`` or ``ROW:PLACE``.

    Pictures that the table only names must lie below ``root``.
    """

    def __init__(self, table: Any, column: str, root: Path) -> None:
        from datasets import Image as ImageFeature

        feature: Any = ImageFeature(decode=False)
        if not isinstance(table.features[column], ImageFeature):
            feature = [feature]
        self.column, self.root = column, root
        self.table = table.select_columns([column]).cast_column(column, feature)

    def find(self, name: str) -> None:
        """Nothing to check: a table always holds its own."""

    def load(self, name: str) -> Image.Image:
        """As `ImageFolder.load`."""
        row, _, place = name.partition(":")
        cell = self.table[int(row)][self.column]
        if place:
            cell = cell[int(place)]
        if cell["bytes"] is not None:
            return decode(cell["bytes"], f"row {name}")
        path = Path(cell["path"] or "")
        if not path.resolve().is_relative_to(self.root.resolve()):
            raise BadSample("path leaves the folder", f"row {name}: {path}")
        return ImageFolder(self.root).load(str(path.resolve().relative_to(self.root.resolve())))


Pictures = ImageFolder | ImageColumn
"""Finds pictures by the names in `Conversation.images`."""


def decode(content: bytes, name: str) -> Image.Image:
    """Open an image file's bytes as `open_image` does; `BadSample` with name and reason if that cannot be done."""
    if not content:
        raise BadSample("empty image", name)
    try:
        return open_image(content, name)
    except PictureError as error:
        raise BadSample("unreadable image", f"{name}: {error.reason}") from error
