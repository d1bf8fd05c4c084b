"""Chat templates of LLaVA's conversation formats."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

VICUNA_V1 = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] != 'system' %}"
    '{{ "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, '
    "detailed, and polite answers to the user's questions. \" }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['content'] is string %}{% set parts = [{'type': 'text', 'text': message['content']}] %}"
    "{% else %}{% set parts = message['content'] %}{% endif %}"
    "{% if message['role'] == 'system' %}{% for part in parts %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' }}"
    "{% for part in parts if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in parts if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% else %}{{ 'ASSISTANT:' }}"
    "{% for part in parts if part['type'] == 'text' %}"
    "{% generation %}{{ ' ' + part['text'] + eos_token }}{% endgeneration %}{% endfor %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""LLaVA's conversation format ``v1`` for Vicuna models, which the paper trained with."""

MISTRAL_INSTRUCT = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['content'] is string %}{% set parts = [{'type': 'text', 'text': message['content']}] %}"
    "{% else %}{% set parts = message['content'] %}{% endif %}"
    "{% if message['role'] == 'system' %}{% for part in parts %}{{ '<<SYS>>\n' + part['text'] + '\n<</SYS>>\n\n' }}"
    "{% endfor %}"
    "{% elif message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for part in parts if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in parts if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{{ ' [/INST]' }}"
    "{% else %}"
    "{% for part in parts if part['type'] == 'text' %}"
    "{% generation %}{{ ' ' + part['text'] + eos_token }}{% endgeneration %}{% endfor %}"
    "{% endif %}{% endfor %}"
)
"""LLaVA-NeXT's conversation format ``mistral_instruct``."""

CHATML = (
    "{% for message in messages %}"
    "{% if message['content'] is string %}{% set parts = [{'type': 'text', 'text': message['content']}] %}"
    "{% else %}{% set parts = message['content'] %}{% endif %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in parts if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in parts if part['type'] == 'text' %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ part['text'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] != 'assistant' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""LLaVA-NeXT's conversation format ``qwen_1_5``."""

LLAMA_3 = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['content'] is string %}{% set parts = [{'type': 'text', 'text': message['content']}] %}"
    "{% else %}{% set parts = message['content'] %}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{% for part in parts if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in parts if part['type'] == 'text' %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ part['text'] + '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] != 'assistant' %}{{ '<|eot_id|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""LLaVA-NeXT's conversation format ``llava_llama_3``, system prompt left to the user."""


def choose_template(decoder: str, vocabulary: Container[str]) -> str | None:
    """The conversation format that LLaVA's code trains a language model in.

    Args:
        decoder: ``model_type`` of the language model.
        vocabulary: The tokenizer's, which tells Llama 3 from Vicuna.

    Returns:
        A template of this module, or None for a language model that LLaVA's code does not know.
    """
    if decoder == "llama" and "<|start_header_id|>" in vocabulary:
        return LLAMA_3
    return {"llama": VICUNA_V1, "mistral": MISTRAL_INSTRUCT, "qwen2": CHATML}.get(decoder)


def fit_template(template: str, tokenizer: Any, image_token: str = "<image>") -> str:
    """Change a template such that a tokenizer makes of it the tokens that LLaVA's own code makes of the conversation.

    LLaVA tokenises the text on each side of an image by itself, and sentencepiece puts a blank before each. Newer
    tokenizers put one at the start of the prompt alone, and none behind a beginning-of-sequence token that is written
    out.

    Args:
        template: One of this module.
        tokenizer: It knows the image token.
        image_token: As the template writes it.

    Returns:
        The template without ``bos_token`` if the tokenizer adds it, and with a blank behind each image if the
        tokenizer adds none.
    """
    if tokenizer.bos_token_id is not None and tokenizer.encode("x")[:1] == [tokenizer.bos_token_id]:
        template = template.removeprefix("{{ bos_token }}")
    alone = tokenizer.encode("\nx", add_special_tokens=False)
    for blank in ("", " "):
        if tokenizer.encode(f"{image_token}{blank}\nx", add_special_tokens=False)[1:] == alone:
            return template.replace(f"{image_token}\n", f"{image_token}{blank}\n")
    return template
