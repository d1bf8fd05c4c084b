"""Chat templates of LLaVA's conversation formats."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import Any

from pmod_cli.output.errors import PmodError

PLACEHOLDER = "<image>"
"""Where a picture goes, in records and prompts."""

VIDEO_PLACEHOLDER = "<video>"
"""Where a video goes, in prompts."""


_LONGEST = 10**7


def check_length(text: str) -> None:
    """Refuse a text that a template made too long to be meant: tokenizers take gigabytes for it."""
    if len(text) > _LONGEST:
        raise PmodError(f"the chat template gives {len(text):,} characters", "it cannot be meant")


def _read(name: str) -> str:
    """A template of the folder ``templates``, without the line breaks and indents that only people need."""
    path = Path(__file__).parent / "templates" / f"{name}.jinja"
    return "".join(line.strip() for line in path.read_text(encoding="utf-8").splitlines())


VICUNA_V1 = _read("vicuna_v1")
"""LLaVA's conversation format ``v1`` for Vicuna models, which the paper trained with."""

MISTRAL_INSTRUCT = _read("mistral_instruct")
"""LLaVA-NeXT's conversation format ``mistral_instruct``."""

CHATML = _read("chatml")
"""LLaVA-NeXT's conversation format ``qwen_1_5``."""

LLAMA_3 = _read("llama_3")
"""LLaVA-NeXT's conversation format ``llava_llama_3``, system prompt left to the user."""


def choose_template(decoder: str, vocabulary: Container[str]) -> str | None:
    """The conversation format that LLaVA's code trains a language model in; None for one that it does not know.

    ``decoder`` is its ``model_type``; the tokenizer's vocabulary tells Llama 3 from Vicuna.
    """
    if decoder == "llama" and "<|start_header_id|>" in vocabulary:
        return LLAMA_3
    return {"llama": VICUNA_V1, "mistral": MISTRAL_INSTRUCT, "qwen2": CHATML}.get(decoder)


def fit_template(template: str, tokenizer: Any, image_token: str = PLACEHOLDER) -> str:
    """Change a template such that a tokenizer gives the tokens that LLaVA's own code gives for a conversation.

    LLaVA tokenises the text on each side of an image by itself, and sentencepiece puts a blank before each. Newer
    tokenizers put one at the start of the prompt alone, and none behind a beginning-of-sequence token that is written
    out. So the template loses ``bos_token`` where the tokenizer adds it, and gets a blank behind each image where it
    adds none.
    """
    if tokenizer.bos_token_id is not None and tokenizer.encode("x")[:1] == [tokenizer.bos_token_id]:
        template = template.removeprefix("{{ bos_token }}")
    alone = tokenizer.encode("\nx", add_special_tokens=False)
    for blank in ("", " "):
        if tokenizer.encode(f"{image_token}{blank}\nx", add_special_tokens=False)[1:] == alone:
            return template.replace(rf"{image_token}\n", rf"{image_token}{blank}\n")
    return template
