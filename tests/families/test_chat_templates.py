"""The chat templates that conversion writes, rendered."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from pmod_cli.families.chat_templates import choose_template

IMAGE, TEXT = {"type": "image"}, {"type": "text", "text": "What?"}
TALK = [
    {"role": "user", "content": [IMAGE, TEXT]},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "Sure?"},
]
EXPECTED = {
    ("llama", "</s>"): (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nWhat? ASSISTANT: A cat.</s>"
        "USER: Sure? ASSISTANT:"
    ),
    ("mistral", "</s>"): "<s>[INST] <image>\nWhat? [/INST] A cat.</s>[INST] Sure? [/INST]",
    ("qwen2", "<|im_end|>"): (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
    ),
    ("llama", "<|start_header_id|>"): (
        "<s><|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA cat.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
}


@pytest.mark.parametrize(("decoder", "token"), EXPECTED)
def test_conversations(decoder, token):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, token: 1}, unk_token="<unk>")),
        bos_token="<s>",
        eos_token="</s>",
    )
    template = choose_template(decoder, {token})
    text = tokenizer.apply_chat_template(
        TALK, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert text == EXPECTED[decoder, token]


def test_no_template_is_made_up():
    assert choose_template("gemma", {}) is None
