"""Where a sample's pictures are: in a folder of files, or in the image column of a `datasets` table.

A picture is opened only when a sample is asked for, in the loader's workers.
"""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from pmod_cli.data.records import BadSample
from pmod_cli.output.errors import PmodError
from pmod_cli.output.paths import real_path
from pmod_cli.output.reading import check_regular
from pmod_cli.pictures import LARGEST, Facts, PictureError, examine_image, is_url, open_image


class _Loader(ABC):
    """Opens pictures by name; `BadSample` with name and reason if that cannot be done."""

    @abstractmethod
    def read(self, name: str) -> tuple[bytes, str]:
        """A picture's file, and what to call it."""

    @abstractmethod
    def finder(self, *, listing: bool) -> Callable[[str], object]:
        """A function that raises `BadSample` for a picture that is not there, without opening it."""

    def load(self, name: str) -> Image.Image:
        """Open a picture as `open_image` does."""
        return decode(*self.read(name))

    def examine(self, name: str) -> Facts:
        """Find what `load` would, as `examine_image` does."""
        return decode(*self.read(name), examine_image)


class ImageFolder(_Loader):
    """Files below one folder; a name never leads out of it.

    Args:
        folder: Names are relative to it, or absolute and inside. A folder linked into it counts as part of it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._roots = (folder.absolute(), folder.resolve())

    def read(self, name: str) -> tuple[bytes, str]:
        """As `find`, and the file's content."""
        try:
            path = self.find(name)
            check_regular(path, LARGEST)
            return path.read_bytes(), name
        except PmodError as error:
            raise BadSample("unreadable image", str(error)) from error
        except OSError as error:
            raise BadSample("unreadable image", f"{name}: {type(error).__name__}") from error

    def finder(self, *, listing: bool) -> Callable[[str], object]:
        """`find`; with ``listing`` each folder is listed once, which is faster than a look at each file."""
        listed: dict[str, set[str]] = {}

        def find(name: str) -> None:
            folder, _, leaf = name.rpartition("/")
            if folder not in listed:
                listed[folder] = set()
                if listing and not is_url(name) and ".." not in PurePosixPath(name).parts and name[:1] != "/":
                    with contextlib.suppress(OSError, ValueError), os.scandir(self.folder / folder) as files:
                        listed[folder] = {file.name for file in files if not file.is_symlink()}
            if leaf not in listed[folder]:
                self.find(name)

        return find

    def find(self, name: str) -> Path:
        """Where a picture is, without opening it; `BadSample` if it is not there or outside the folder."""
        if is_url(name):
            raise BadSample("URL", f"{name}: pictures are read from --images; download it there")
        path = self.folder / name  # an absolute name stays what it is
        inside = any(path.is_relative_to(root) for root in (self.folder, *self._roots))
        if not inside or ".." in PurePosixPath(name).parts:
            raise BadSample("path leaves the folder", name)
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


class ImageColumn(_Loader):
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

    def finder(self, *, listing: bool) -> Callable[[str], object]:
        """Nothing to look for: a table always holds its own."""
        return lambda name: None

    def read(self, name: str) -> tuple[bytes, str]:
        """The picture's bytes, of the table or of the file that it names."""
        row, _, place = name.partition(":")
        cell = self.table[int(row)][self.column]
        if place:
            cell = cell[int(place)]
        if cell is None or not (cell["bytes"] is not None or cell["path"]):
            raise BadSample("missing image", f"row {name}")
        if cell["bytes"] is not None:
            return cell["bytes"], f"row {name}"
        try:
            path, root = real_path(cell["path"]), real_path(self.root)
        except ValueError:  # a zero byte
            raise BadSample("missing image", f"row {name}") from None
        if not path.is_relative_to(root):
            raise BadSample("path leaves the folder", f"row {name}: {cell['path']}")
        return ImageFolder(root).read(str(path.relative_to(root)))


Pictures = ImageFolder | ImageColumn
"""Finds pictures by the names in `Conversation.images`."""


def decode(content: bytes, name: str, opened: Callable[[bytes, str], Any] = open_image) -> Any:
    """Open an image file's bytes as `open_image` does; `BadSample` with name and reason if that cannot be done."""
    if not content:
        raise BadSample("empty image", name)
    try:
        return opened(content, name)
    except PictureError as error:
        raise BadSample("unreadable image", f"{name}: {error.reason}") from error
