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
from transformers import AutoModelForImageTextToText, AutoProcessor

import pmod_cli  # noqa: F401  (registers the p-MoD model types with the Auto classes)
from pmod_cli.checkpoints.load import check_tokenizer, quiet_transformers, read_config
from pmod_cli.devices import check_dtype, find_device
from pmod_cli.kernels import use_kernels
from pmod_cli.output.errors import PmodError, first_line, told_as
from pmod_cli.pictures import as_rgb

IMAGE_BACKEND = "pil"
"""Image processor back end used everywhere: LLaVA was trained with it, and torchvision's differs by up to 0.015."""

DEFAULT_MAX_NEW_TOKENS = 1024
"""What lmms-eval's LLaVA models use where a task does not say."""

# transformers' own generation settings that a task may set; others (`until`, `image_aspect_ratio`, ...) are not its.
_SETTINGS = (
    "max_new_tokens", "min_new_tokens", "num_beams", "length_penalty", "repetition_penalty", "no_repeat_ngram_size",
)  # fmt: skip
_LONGEST = 10**7
"""Characters of a prompt; tokenizers take gigabytes for more."""

_SAMPLING_SETTINGS = ("temperature", "top_p", "top_k")


@dataclass(frozen=True)
class Prompt:
    """A user's turn: text and the pictures that come before it."""

    text: str
    images: tuple[Image.Image, ...] = ()


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
    """Make a `PmodError` of what a model raises over inputs that its own processor made; out of memory stays so."""
    try:
        yield
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
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
        check_tokenizer(source)
        device = find_device(device)
        check_dtype(dtype)
        if dtype == "auto" and device.type == "cpu":
            dtype = "float32"
        options = {"attn_implementation": attn_implementation} if attn_implementation else {}
        with told_as(f"cannot load {source}"), quiet_transformers(bars=True):
            processor = AutoProcessor.from_pretrained(source, backend=image_backend, trust_remote_code=False)
            model, info = AutoModelForImageTextToText.from_pretrained(
                source,
                dtype=dtype,
                output_loading_info=True,
                use_safetensors=True,
                trust_remote_code=False,
                **options,
            )
            model.to(device)
        if info["missing_keys"]:
            # transformers would go on with random numbers there.
            missing = sorted(info["missing_keys"])
            raise PmodError(f"{source} lacks {len(missing)} of the model's tensors, e.g. {missing[0]}")
        used = use_kernels(model, kernels)
        return cls(model, processor, cache, used)

    @property
    def device(self) -> torch.device:
        """The device of the model's weights."""
        return self.model.device

    def render(self, prompt: Prompt) -> str:
        """The prompt with the chat template applied, up to where the answer begins."""
        token = self.processor.image_token
        # A literal image token in a question would be taken for one more picture.
        text = prompt.text.replace(token, "")
        content = [{"type": "image"} for _ in prompt.images] + [{"type": "text", "text": text}]
        with told_as("the checkpoint's chat template fails"):
            text = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
        if len(text) > _LONGEST:
            raise PmodError(f"the prompt takes {len(text):,} characters", "it cannot be meant")
        return text

    def length(self, prompt: Prompt) -> int:
        """Tokens of the prompt, vision tokens included; without running the image processor."""
        text_ids = self.processor.tokenizer(self.render(prompt)).input_ids
        sizes = [(image.height, image.width) for image in prompt.images]
        vision = (
            self.processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens if sizes else []
        )
        return len(text_ids) - len(sizes) + sum(vision)

    def encode(self, prompts: Sequence[Prompt]) -> Any:
        """The model's inputs for a batch of prompts, padded on the left, on the CPU."""
        images = [as_rgb(image) for prompt in prompts for image in prompt.images]
        texts = [self.render(prompt) for prompt in prompts]
        with told_as("the checkpoint's processor fails"):
            return self.processor(text=texts, images=images or None, padding=True, return_tensors="pt")

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt], **settings: Any) -> list[Answer]:
        """Answer a batch of prompts, with `generation_settings`; an answer does not depend on the other prompts."""
        inputs = self.encode(prompts).to(self.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            kept = {"cache_implementation": "static"} if self.cache == "static" else {}
            with fitting():
                output = self.model.generate(**inputs, **generation_settings(settings), **kept)
        new_ids = output[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(new_ids, skip_special_tokens=True)
        prompt_tokens = inputs["attention_mask"].sum(1).tolist()
        eos = self.model.generation_config.eos_token_id
        # Up to and with the first end-of-sequence token.
        ended = torch.isin(new_ids, torch.as_tensor([] if eos is None else eos, device=new_ids.device)).int()
        new_tokens = (ended.cumsum(1) - ended == 0).sum(1).tolist()
        return [
            Answer(text.strip(), length, new)
            for text, length, new in zip(texts, prompt_tokens, new_tokens, strict=True)
        ]
