"""Answers to image-and-text prompts from a checkpoint, dense or p-MoD: one at a time or in left-padded batches."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
)

import pmod_cli  # noqa: F401  (registers the p-MoD model types with the Auto classes)
from pmod_cli.checkpoints.load import (
    check_tokenizer,
    check_weights,
    loading,
    quiet_transformers,
    read_config,
)
from pmod_cli.devices import check_dtype, find_device, is_of_the_device
from pmod_cli.families import families_with_videos
from pmod_cli.families.agreement import agree
from pmod_cli.families.chat_templates import PLACEHOLDER, VIDEO_PLACEHOLDER, check_length
from pmod_cli.families.processing import (
    IMAGE_BACKEND,
    PROCESSOR_FAILS,
    in_groups,
    load_processor,
    message,
    picture_ids,
    pixels_shared,
    takes_videos,
    video_arguments,
)
from pmod_cli.kernels import use_kernels
from pmod_cli.output.errors import PmodError, first_line, told_as
from pmod_cli.prompts import Prompt
from pmod_cli.stopping import Numbers, StopStrings
from pmod_cli.videos import Video

DEFAULT_MAX_NEW_TOKENS = 1024
"""What lmms-eval's LLaVA models use where a task does not say."""

# transformers' own generation settings that a task may set; others (`until`, `image_aspect_ratio`, ...) are not its.
_SETTINGS = (
    "max_new_tokens", "min_new_tokens", "num_beams", "length_penalty", "repetition_penalty", "no_repeat_ngram_size",
)  # fmt: skip
_SAMPLING_SETTINGS = ("temperature", "top_p", "top_k")


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        text: Decoded without special tokens, white space stripped at both ends.
        prompt_tokens: Tokens of the prompt, vision tokens included, padding not.
        new_tokens: Generated tokens, the end-of-sequence token included.
    """

    text: str
    prompt_tokens: int
    new_tokens: int


@contextmanager
def fitting() -> Iterator[None]:
    """Make a `PmodError` of what a model raises over inputs that its own processor made; the device's errors stay."""
    try:
        yield
    except PmodError:
        raise
    except Exception as error:
        if is_of_the_device(error):
            raise
        raise PmodError(f"the checkpoint's model and processor do not fit: {first_line(error)}") from error


def generation_settings(requested: Mapping[str, Any]) -> dict[str, Any]:
    """Keep what transformers' ``generate`` knows, e.g. of a task's ``generation_kwargs``; greedy unless told else."""
    settings = {name: requested[name] for name in _SETTINGS if requested.get(name) is not None}
    settings.setdefault("max_new_tokens", DEFAULT_MAX_NEW_TOKENS)
    settings["do_sample"] = bool(requested.get("do_sample") and requested.get("temperature", 1) != 0)
    for name in _SAMPLING_SETTINGS:
        # None, not absent: else a checkpoint's own generation_config.json would fill them in.
        settings[name] = requested.get(name) if settings["do_sample"] else None
    return settings


class VisionLanguageModel:
    """A transformers image-text-to-text model with its processor, which has a chat template."""

    def __init__(
        self, model: Any, processor: Any, cache: str = "dynamic", kernels: Sequence[str] = ()
    ) -> None:
        self.model = model.eval()
        self.cache, self.kernels = cache, list(kernels)
        self.processor = processor
        tokenizer = processor.tokenizer
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        # Of the checkpoint's own settings (sampling, beams, static cache ...) only what ends an answer counts.
        given = model.generation_config
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(given, name)
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if any(type(each) is not int or not 0 <= each < 2**31 for each in ids):
                raise PmodError(f"generation_config.json: {name} is {value!r:.40}, not the id of a token")
        self.model.generation_config = GenerationConfig(
            bos_token_id=given.bos_token_id,
            eos_token_id=tokenizer.eos_token_id if given.eos_token_id is None else given.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        if not getattr(processor, "chat_template", None):
            raise PmodError(
                "the checkpoint has no chat template", "add chat_template.jinja, as llava-hf's have"
            )

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        dtype: str = "auto",
        device: str | torch.device | None = None,
        attn_implementation: str | None = None,
        image_backend: str = IMAGE_BACKEND,
        kernels: str = "auto",
        cache: str = "dynamic",
    ) -> VisionLanguageModel:
        """Load a checkpoint.

        Args:
            source: A folder, or a hub id.
            dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto``: the checkpoint's on a GPU, float32 on a CPU.
            device: ``cpu``, ``cuda``, ``cuda:1`` ...; None or ``auto`` for a GPU if there is one.
            attn_implementation: As transformers calls it; its own choice by default.
            image_backend: ``pil`` or ``torchvision``.
            kernels: See `use_kernels`.
            cache: ``dynamic``, or ``static``: fixed shapes, so that a GPU runs compiled decode steps.

        Raises:
            PmodError: If the source is missing, incomplete or of a model type that is not supported; or there is no
                such device or dtype.
        """
        read_config(source)
        check_weights(source)
        check_tokenizer(source)
        device = find_device(device)
        check_dtype(dtype)
        if dtype == "auto" and device.type == "cpu":
            dtype = "float32"
        options = {"attn_implementation": attn_implementation} if attn_implementation else {}
        with loading(source), quiet_transformers(bars=True):
            processor = load_processor(source, image_backend)
            model, info = AutoModelForImageTextToText.from_pretrained(
                source,
                dtype=dtype,
                output_loading_info=True,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # told below, by name
                **options,
            )
            model.to(device)
        if info["missing_keys"]:
            # transformers would go on with random numbers there.
            missing = sorted(info["missing_keys"])
            raise PmodError(f"{source} lacks {len(missing)} of the model's tensors, e.g. {missing[0]}")
        if info["mismatched_keys"]:
            name, stored, wanted = sorted(info["mismatched_keys"])[0]
            raise PmodError(
                f"{source}: {name} has shape {list(stored)}, and config.json (or its defaults) says {list(wanted)}",
                "a DeepSpeed ZeRO-3 run has to gather its weights when it saves" if 0 in stored else None,
            )
        agree(model.config, processor)
        used = use_kernels(model, kernels)
        return cls(model, processor, cache, used)

    @property
    def device(self) -> torch.device:
        """The device of the model's weights."""
        return self.model.device

    def render(self, prompt: Prompt) -> str:
        """The prompt in the chat template, up to where the answer begins; `PmodError` if the model takes no videos."""
        text = prompt.text
        if prompt.videos and not takes_videos(self.processor):
            raise PmodError("the model takes no videos", families_with_videos())
        if not prompt.images:
            text = text.replace(PLACEHOLDER, "")
        elif PLACEHOLDER not in text:
            text = PLACEHOLDER * len(prompt.images) + text
        if prompt.videos and VIDEO_PLACEHOLDER not in text:
            text = VIDEO_PLACEHOLDER * len(prompt.videos) + text
        return self._template([message(self.processor, "user", text, videos=bool(prompt.videos))])

    def _template(self, turns: Sequence[Mapping[str, Any]]) -> str:
        with told_as("the checkpoint's chat template fails"):
            text: str = self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        check_length(text)
        return text

    def length(self, prompt: Prompt) -> int:
        """Tokens of the prompt, vision tokens included; without running the image processor if there is no video."""
        if prompt.videos:
            return int(self.encode([prompt])["attention_mask"].sum())
        text_ids = self.processor.tokenizer(self.render(prompt)).input_ids
        pictures = picture_ids(self.processor, [image.size for image in prompt.images])
        return len(text_ids) - len(pictures) + sum(map(len, pictures))

    @property
    def context(self) -> int | None:
        """Tokens that the model can read, prompt and answer together; None if its config does not say."""
        tokens: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return tokens

    def check_context(self, prompt_tokens: int, new_tokens: int = 1) -> None:
        """Refuse a prompt that leaves no room for an answer of so many tokens, as a `PmodError`."""
        if self.context and prompt_tokens + new_tokens > self.context:
            raise PmodError(
                f"the prompt takes {prompt_tokens:,} tokens, the answer may take {new_tokens:,}, and the model reads "
                f"{self.context:,}",
                "shorten it",
            )

    def encode(self, prompts: Sequence[Prompt]) -> Any:
        """The model's inputs for a batch of prompts, padded on the left, on the CPU; else `PmodError`."""
        texts = [self.render(prompt) for prompt in prompts]
        images, videos = [prompt.images for prompt in prompts], [prompt.videos for prompt in prompts]
        if pixels_shared(self.processor) and any(images) and any(videos):
            raise PmodError("the model takes pictures or a video in one prompt, not both")
        return self._process(texts, images, videos)

    def encode_chat(self, turns: Sequence[Mapping[str, Any]], images: Sequence[Image.Image]) -> Any:
        """The model's inputs for one conversation and its pictures in order, where the model is; else `PmodError`.

        Threads may call it side by side: without padding, nothing of the tokenizer is changed.
        """
        return self._placed(self._process([self._template(turns)], [images], padding=False))

    def _process(
        self,
        texts: list[str],
        images: Sequence[Sequence[Image.Image]],
        videos: Sequence[Sequence[Video]] = (),
        padding: bool = True,
    ) -> Any:
        with told_as(PROCESSOR_FAILS):
            return self.processor(
                text=texts,
                images=in_groups(self.processor, images),
                **video_arguments(self.processor, videos),
                padding=padding,
                return_tensors="pt",
            )

    def _placed(self, inputs: Any) -> Any:
        """On the model's device, pixels in its number format."""
        inputs = inputs.to(self.device)
        for name in inputs.keys() & {"pixel_values", "pixel_values_videos"}:
            inputs[name] = inputs[name].to(self.model.dtype)
        return inputs

    def generate(self, prompts: Sequence[Prompt], **settings: Any) -> list[Answer]:
        """Answer a batch of prompts, with `generation_settings`; an answer does not depend on the other prompts.

        A setting ``until``, a string or several, ends an answer with the first of them that it contains.
        """
        seeing = [bool(prompt.videos) for prompt in prompts]
        if not pixels_shared(self.processor) or len(set(seeing)) < 2:
            return self.answer(self.encode(prompts), **settings)
        # What has a video and what has pictures cannot be in one batch.
        answers: dict[int, Answer] = {}
        for kind in (False, True):
            group = [index for index, seen in enumerate(seeing) if seen == kind]
            inputs = self.encode([prompts[index] for index in group])
            answers |= zip(group, self.answer(inputs, **settings), strict=True)
        return [answers[index] for index in range(len(prompts))]

    @torch.inference_mode()
    def answer(self, inputs: Any, **settings: Any) -> list[Answer]:
        """Answer a batch that `encode` made, as `generate` does."""
        inputs = self._placed(inputs)
        until = settings.get("until") or []
        strings = [string for string in ([until] if isinstance(until, str) else until) if string]
        # Beams change places, so that a row that stopped need not be the answer's.
        stops = strings and settings.get("num_beams") in (None, 1)
        stop = StopStrings(self.processor.tokenizer, strings, inputs["input_ids"].shape)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            kept = {"cache_implementation": "static"} if self.cache == "static" else {}
            with fitting():
                output = self.model.generate(
                    **inputs,
                    **generation_settings(settings),
                    **kept,
                    stopping_criteria=StoppingCriteriaList([stop] if stops else []),
                    logits_processor=LogitsProcessorList([Numbers()]),
                )
        new_ids = output[:, inputs["input_ids"].shape[1] :]
        ends = [stop.ends.get(row, new_ids.shape[1]) for row in range(len(new_ids))]
        rows = [ids[:end] for ids, end in zip(new_ids, ends, strict=True)]
        texts = self.processor.batch_decode(rows, skip_special_tokens=True)
        prompt_tokens = inputs["attention_mask"].sum(1).tolist()
        eos = self.model.generation_config.eos_token_id
        # Up to and with the first end-of-sequence token.
        ended = torch.isin(new_ids, torch.as_tensor([] if eos is None else eos, device=new_ids.device)).int()
        new_tokens = (ended.cumsum(1) - ended == 0).sum(1).tolist()
        return [
            Answer(text.strip(), length, min(new, end))
            for text, length, new, end in zip(texts, prompt_tokens, new_tokens, ends, strict=True)
        ]
