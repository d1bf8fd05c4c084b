"""What every family's processor is used for: loading it, writing a turn, counting and processing pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor

from pmod_cli.families.chat_templates import PLACEHOLDER

IMAGE_BACKEND = "pil"
"""Image processor back end used everywhere: LLaVA was trained with it, and torchvision's differs by up to 0.015."""

_LEADING = re.compile(rf"(?:\s*{PLACEHOLDER})+\s*")


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
    processor: Any = AutoProcessor.from_pretrained(source)
    # Not given to AutoProcessor: it would hand it to the video processor too, which has no such choice.
    processor.image_processor = AutoImageProcessor.from_pretrained(source, backend=backend)
    return processor


def message(processor: Any, role: str, text: str) -> dict[str, Any]:
    """One turn for ``apply_chat_template``, its pictures where `PLACEHOLDER` stands in the text.

    Pictures in front of all words are the template's image parts. Others are written into the text: llava-hf's
    templates would move image parts to the front. What reads like another special token is text: ``</s>`` becomes
    ``< /s>``.
    """
    leading = _LEADING.match(text)
    images, rest = (leading[0].count(PLACEHOLDER), text[leading.end() :]) if leading else (0, text)
    if PLACEHOLDER in rest:
        images, rest = 0, text
    special = _special_tokens(processor.tokenizer)
    pieces = [special.sub(_broken, piece) for piece in rest.split(PLACEHOLDER)]
    written = {"type": "text", "text": processor.image_token.join(pieces)}
    return {"role": role, "content": [{"type": "image"}] * images + [written]}


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


def in_groups(processor: Any, samples: Sequence[Sequence[Image.Image]]) -> list[Any] | None:
    """The pictures of a batch as its processor and image processor take them; None if there are none."""
    groups = [list(images) for images in samples if images]
    if any(_one_tile_each(processor, len(images)) for images in groups):
        return groups
    return [image for images in groups for image in images] or None
