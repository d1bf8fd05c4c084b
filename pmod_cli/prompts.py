"""A user's turn: its text, pictures and videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from pmod_cli.families.chat_templates import PLACEHOLDER, VIDEO_PLACEHOLDER
from pmod_cli.output.errors import PmodError
from pmod_cli.pictures import as_rgb
from pmod_cli.videos import Video


@dataclass(frozen=True)
class Prompt:
    """A user's turn: text, and pictures that go where ``<image>`` stands in it, or before it if that stands nowhere.

    Pictures are made RGB as `as_rgb` does. Without pictures, ``<image>`` in the text is left out. Likewise ``<video>``
    and videos.

    Raises:
        PmodError: The text cannot be UTF-8, or has another number of ``<image>`` than there are pictures, or of
            ``<video>`` than videos.
    """

    text: str
    images: tuple[Image.Image, ...] = ()
    videos: tuple[Video, ...] = ()

    def __post_init__(self) -> None:
        try:
            self.text.encode()
        except UnicodeEncodeError:
            raise PmodError("the prompt is not UTF-8", "another encoding wrote it") from None
        object.__setattr__(self, "images", tuple(map(as_rgb, self.images)))
        given: dict[str, tuple[str, Sequence[Any]]] = {
            PLACEHOLDER: ("pictures", self.images),
            VIDEO_PLACEHOLDER: ("videos", self.videos),
        }
        for place, (kind, media) in given.items():
            places = self.text.count(place)
            if media and places not in (0, len(media)):
                raise PmodError(
                    f"the prompt has {places} {place} and {len(media)} {kind}",
                    f"write one {place} for each, or none: then all come first",
                )

    @property
    def nbytes(self) -> int:
        """Memory that its pictures and videos take."""
        return sum(3 * image.width * image.height for image in self.images) + sum(
            video.frames.nbytes for video in self.videos
        )
