"""What every family's processor is used for: loading it, writing a turn, counting and processing pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor

from pmod_cli.families.chat_templates import PLACEHOLDER, VIDEO_PLACEHOLDER

IMAGE_BACKEND = "pil"
"""Image processor back end used everywhere: LLaVA was trained with it, and torchvision's differs by up to 0.015."""


class Sized(Protocol):
    """A picture, or what is known of it."""

    @property
    def width(self) -> int:
        """In pixels."""

    @property
    def height(self) -> int:
        """In pixels."""


def load_processor(source: str | Path, backend: str = IMAGE_BACKEND) -> Any:
    """A checkpoint's processor; ``backend``, ``pil`` or ``torchvision``, is its image processor's."""
    processor: Any = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    # Not given to AutoProcessor: it would hand it to the video processor too, which has no such choice.
    processor.image_processor = AutoImageProcessor.from_pretrained(
        source, backend=backend, trust_remote_code=False
    )
    return processor


def message(processor: Any, role: str, text: str, *, videos: bool = False) -> dict[str, Any]:
    """One turn for ``apply_chat_template``, its pictures where `PLACEHOLDER` stands in the text.

    With ``videos`` they stand where `VIDEO_PLACEHOLDER` does. What is in front of all words is the template's image
    and video parts. Where it is not, all is written into the text: llava-hf's templates would move parts to the front.
    What reads like another special token is text: ``</s>`` becomes ``< /s>``.
    """
    kinds = {PLACEHOLDER: "image"} | ({VIDEO_PLACEHOLDER: "video"} if videos else {})
    words, *following = re.split(f"({'|'.join(kinds)})", text)
    places, texts = following[::2], [words, *following[1::2]]
    special = _special_tokens(processor.tokenizer)
    texts = [special.sub(_broken, piece) for piece in texts]
    if not any(piece.strip() for piece in texts[:-1]):
        last = texts[-1].lstrip() if places else texts[-1]
        parts = [{"type": kinds[place]} for place in places]
        return {"role": role, "content": [*parts, {"type": "text", "text": last}]}
    # LLaVA's own tokenizer puts a blank before the text behind an image: see `fit_template`.
    blank = " " if rf"{processor.image_token} \n" in processor.chat_template else ""
    written = texts[0]
    for number, (place, piece) in enumerate(zip(places, texts[1:], strict=True), 1):
        token = processor.image_token if kinds[place] == "image" else processor.video_token
        written += token + (blank if piece or number == len(places) else "") + piece
    return {"role": role, "content": [{"type": "text", "text": written}]}


@lru_cache(maxsize=8)
def _special_tokens(tokenizer: Any) -> re.Pattern[str]:
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("|".join(map(re.escape, sorted(filter(None, added), key=len, reverse=True))) or "(?!)")


def _broken(token: re.Match[str]) -> str:
    return f"{token[0][0]} {token[0][1:]}"


def _one_tile_each(processor: Any, images: int) -> bool:
    """LLaVA-OneVision takes each of several pictures of one conversation as one tile."""
    return images > 1 and "batch_num_images" in processor.image_processor.model_input_names


def image_tokens(processor: Any, images: Sequence[Sized]) -> list[int]:
    """How many tokens each picture of one conversation takes in the prompt."""
    if not images:
        return []
    if _one_tile_each(processor, len(images)):
        cut = processor.vision_feature_select_strategy == "default"
        return [processor.num_image_tokens + 1 - cut] * len(images)  # the newline's too
    sizes = [(image.height, image.width) for image in images]
    return list(processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"])


def video_tokens(processor: Any, frames: Sequence[int]) -> list[int]:
    """How many tokens videos of so many frames take in the prompt."""
    if not frames:
        return []
    sizes = [(count, 1, 1) for count in frames]
    return list(processor._get_num_multimodal_tokens(video_sizes=sizes)["num_video_tokens"])


def in_groups(processor: Any, samples: Sequence[Sequence[Image.Image]]) -> list[Any] | None:
    """The pictures of a batch as its processor and image processor take them; None if there are none."""
    groups = [list(images) for images in samples if images]
    if any(_one_tile_each(processor, len(images)) for images in groups):
        return groups
    return [image for images in groups for image in images] or None
