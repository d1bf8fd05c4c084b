"""What every family's processor is used for: loading it, writing a turn, counting and processing pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor

from pmod_cli.families.chat_templates import PLACEHOLDER, VIDEO_PLACEHOLDER, check_length
from pmod_cli.families.tiling import split_grid
from pmod_cli.output.bounds import bounded
from pmod_cli.output.errors import PmodError, told_as
from pmod_cli.videos import Video

IMAGE_BACKEND = "pil"
"""Image processor back end used everywhere: LLaVA was trained with it, and torchvision's differs by up to 0.015."""

PROCESSOR_FAILS = "the checkpoint's processor fails"

_TEXT_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids")


def load_processor(source: str | Path, backend: str = IMAGE_BACKEND) -> Any:
    """A checkpoint's processor; ``backend``, ``pil`` or ``torchvision``, is its image processor's."""
    processor: Any = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    # Not given to AutoProcessor: it would hand it to the video processor too, which has no such choice.
    processor.image_processor = AutoImageProcessor.from_pretrained(
        source, backend=backend, trust_remote_code=False
    )
    _try_template(processor)
    return processor


def _try_template(processor: Any) -> None:
    """Refuse a chat template that takes minutes or gigabytes for one word; other faults are told where it is used."""
    turn = {"role": "user", "content": [{"type": "image"}, _written("x")]}
    try:
        with bounded(seconds=5, gigabytes=1):
            text = processor.apply_chat_template([turn], tokenize=False)
    except (MemoryError, TimeoutError) as error:
        raise PmodError("the checkpoint's chat template never ends", "it cannot be meant") from error
    except Exception:
        return
    if isinstance(text, str):
        check_length(text)


def message(processor: Any, role: str, text: str, *, videos: bool = False) -> dict[str, Any]:
    """One turn for ``apply_chat_template``, its pictures where `PLACEHOLDER` stands in the text.

    With ``videos`` they stand where `VIDEO_PLACEHOLDER` does. Where a template leaves image and video parts in their
    places, they are parts. llava-hf's templates move parts to the front: there they are parts if they are in front of
    all words, else all is written into the text. What reads like another special token is text: ``</s>`` becomes
    ``< /s>``.
    """
    kinds = {PLACEHOLDER: "image"} | ({VIDEO_PLACEHOLDER: "video"} if videos else {})
    words, *following = re.split(f"({'|'.join(kinds)})", text)
    places, texts = following[::2], [words, *following[1::2]]
    special = _special_tokens(processor.tokenizer)
    texts = [special.sub(_broken, piece) for piece in texts]
    if not any(piece.strip() for piece in texts[:-1]):
        last = texts[-1].lstrip() if places else texts[-1]
        parts = [{"type": kinds[place]} for place in places]
        return {"role": role, "content": [*parts, _written(last)]}
    if _keeps_order(processor):
        parts = [_written(texts[0])] if texts[0].strip() else []
        for place, piece in zip(places, texts[1:], strict=True):
            worded = any(part["type"] == "text" for part in parts)
            parts.append({"type": kinds[place]})
            piece = piece if worded else piece.lstrip()
            parts += [_written(piece)] if piece else []
        return {"role": role, "content": parts}
    # LLaVA's own tokenizer puts a blank before the text behind an image: see `fit_template`.
    blank = " " if rf"{processor.image_token} \n" in processor.chat_template else ""
    written = texts[0]
    for number, (place, piece) in enumerate(zip(places, texts[1:], strict=True), 1):
        token = processor.image_token if kinds[place] == "image" else processor.video_token
        written += token + (blank if piece or number == len(places) else "") + piece
    return {"role": role, "content": [_written(written)]}


def turn_of_parts(processor: Any, role: str, parts: Sequence[str | None]) -> dict[str, Any]:
    """One turn for ``apply_chat_template``: texts, and None where a picture is; the template says where they go.

    Special tokens in a text, ``<image>`` too, are text, as in `message`.
    """
    special, made = _special_tokens(processor.tokenizer), []
    for part in parts:
        if part is None:
            made.append({"type": "image"})
            continue
        text = special.sub(_broken, part)
        behind = bool(made) and all(each["type"] == "image" for each in made)
        made.append(_written(text.lstrip() if behind else text))
    return {"role": role, "content": made}


def _written(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _keeps_order(processor: Any) -> bool:
    """Whether the chat template leaves a picture between the words where it is."""
    content = [_written("before"), {"type": "image"}, _written("after")]
    text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    return bool(re.search(f"before.*{re.escape(processor.image_token)}.*after", text, re.DOTALL))


@lru_cache(maxsize=8)
def _special_tokens(tokenizer: Any) -> re.Pattern[str]:
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("|".join(map(re.escape, sorted(filter(None, added), key=len, reverse=True))) or "(?!)")


def _broken(token: re.Match[str]) -> str:
    return f"{token[0][0]} {token[0][1:]}"


def _one_tile_each(processor: Any, images: int) -> bool:
    """LLaVA-OneVision takes each of several pictures of one conversation as one tile."""
    return images > 1 and "batch_num_images" in processor.image_processor.model_input_names


@told_as(PROCESSOR_FAILS)
def picture_ids(processor: Any, sizes: Sequence[tuple[int, int]]) -> list[list[int]]:
    """What each picture of one conversation becomes in the prompt: token ids, those of marks around it included.

    Args:
        processor: A family's.
        sizes: (width, height) of each picture, pixels.
    """
    if not sizes:
        return []
    if _one_tile_each(processor, len(sizes)):
        cut = processor.vision_feature_select_strategy == "default"
        return [[_token(processor)] * (processor.num_image_tokens + 1 - cut)] * len(
            sizes
        )  # the newline's too
    known = _known(processor)
    for size in sizes:
        if size not in known.cuts:
            known.cuts[size] = key = _cut(processor, size, known.marks)
            if key not in known.ids:
                known.ids[key] = _written_ids(processor, size) if known.marks else [_token(processor)] * key
    return [known.ids[known.cuts[size]] for size in sizes]


class _Known(NamedTuple):
    """What a processor was asked about its pictures; asking takes longer than tokenising a conversation.

    ``marks`` says whether it writes anything but the picture's tokens (marks around them, ends of rows), or cannot
    count them. ``cuts`` has, by (width, height), how such a picture is cut, and ``ids`` what a picture that is cut so
    becomes.
    """

    settings: str
    marks: bool
    cuts: dict[tuple[int, int], Any]
    ids: dict[Any, list[int]]


_KNOWN: WeakKeyDictionary[Any, _Known] = WeakKeyDictionary()


def _known(processor: Any) -> _Known:
    """What is known of a processor as it is set now: that is part of what it is known by."""
    own = [
        (name, value)
        for name, value in vars(processor).items()
        if isinstance(value, (int, str, list, dict)) and name != "chat_template"
    ]
    settings = repr((vars(processor.image_processor), own, id(processor.tokenizer)))
    known = _KNOWN.get(processor)
    if known is None or known.settings != settings:
        counts = hasattr(processor, "_get_num_multimodal_tokens") and _resizes(processor)
        marks = not counts or set(_written_ids(processor, (64, 64))) != {_token(processor)}
        known = _KNOWN[processor] = _Known(settings, marks, {}, {})
    return known


def _resizes(processor: Any) -> bool:
    """Whether pictures are resized, as transformers' counts take for granted."""
    return getattr(processor.image_processor, "do_resize", True) is not False


def _token(processor: Any) -> int:
    return int(processor.tokenizer.convert_tokens_to_ids(processor.image_token))


def _cut(processor: Any, size: tuple[int, int], marks: bool) -> Any:
    """How a picture of (width, height) is cut, as far as its tokens depend on it; without marks their number."""
    shape = (size[1], size[0])
    if not marks:
        return int(processor._get_num_multimodal_tokens(image_sizes=[shape])["num_image_tokens"][0])
    if not _resizes(processor):
        return size
    settings = processor.image_processor.to_dict()
    if settings.get("do_image_splitting"):
        # Not transformers' own count, which is wrong for some shapes.
        return split_grid(shape, settings["size"]["longest_edge"], settings["max_image_size"]["longest_edge"])
    if hasattr(processor, "_get_num_multimodal_tokens"):
        return tuple(processor._get_num_multimodal_tokens(image_sizes=[shape])["num_image_tokens"])
    return size


def _written_ids(processor: Any, size: tuple[int, int]) -> list[int]:
    """What the processor itself writes for a picture of (width, height)."""
    pictures = in_groups(processor, [[Image.new("RGB", size)]])
    made = processor(text=[processor.image_token], images=pictures, add_special_tokens=False)
    return [int(token) for token in made["input_ids"][0]]


@told_as(PROCESSOR_FAILS)
def picture_inputs(processor: Any, samples: Sequence[Sequence[Image.Image]]) -> dict[str, Any]:
    """The model's inputs for the pictures of a batch: pixels, and what the family says of them; none for no picture."""
    pictures = in_groups(processor, samples)
    if pictures is None:
        return {}
    if not _known(processor).marks:  # the image processor alone gives all there is
        return dict(processor.image_processor(pictures, return_tensors="pt"))
    texts = [processor.image_token * len(images) for images in samples]
    made = processor(text=texts, images=pictures, padding=True, return_tensors="pt")
    return {name: value for name, value in made.items() if name not in _TEXT_INPUTS}


def takes_videos(processor: Any) -> bool:
    """Whether it is one that takes videos."""
    return hasattr(processor, "video_token") and getattr(processor, "video_processor", None) is not None


def pixels_shared(processor: Any) -> bool:
    """Whether pictures and videos are one and the same input of the model: a batch has only the one or the other.

    SmolVLM2's video is a row of pictures.
    """
    return takes_videos(processor) and "pixel_values" in processor.video_processor.model_input_names


def video_arguments(processor: Any, samples: Sequence[Sequence[Video]]) -> dict[str, Any]:
    """What the processor is called with for the videos of a batch; nothing if there are none."""
    videos = [video for sample in samples for video in sample]
    if not videos:
        return {}
    # A row for each sample, where the processor counts its videos in the text.
    frames: list[Any] = [[video.frames for video in sample] for sample in samples]
    if not pixels_shared(processor):
        frames = [video.frames for video in videos]
    arguments = {
        "videos": frames,
        "video_metadata": [video.metadata for video in videos],
        "do_sample_frames": False,
    }
    # Qwen's own code caps the pixels of a frame; transformers' only when asked, and warns where it is not told.
    if getattr(processor.video_processor, "cap_pixels_per_frame", False) is None:
        arguments["cap_pixels_per_frame"] = True
    return arguments


def in_groups(processor: Any, samples: Sequence[Sequence[Image.Image]]) -> list[Any] | None:
    """The pictures of a batch as its processor takes them; None if there are none."""
    groups = [list(images) for images in samples]
    if not any(groups):
        return None
    if "pixel_attention_mask" in processor.image_processor.model_input_names:
        return groups  # one row of pictures for each sample, those without one too
    if any(_one_tile_each(processor, len(images)) for images in groups):
        return [images for images in groups if images]
    return [image for images in groups for image in images]
