"""The chat templates that conversion writes, rendered."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pmod_cli.families.chat_templates import VICUNA_V1, choose_template, fit_template
from pmod_cli.families.processing import message

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


class TextProcessor:
    """As much of a processor as `message` needs."""

    image_token = "<image>"

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.chat_template = fit_template(VICUNA_V1, tokenizer)

    def apply_chat_template(self, messages, **options):
        return self.tokenizer.apply_chat_template(messages, chat_template=self.chat_template, **options)


@pytest.mark.parametrize("scheme", ["first", "never"])
@pytest.mark.parametrize(
    "asked",
    [
        "<image>\nWhat?",
        "Before: <image>\nAfter: <image>\nWhich?",
        "Is <image>this or <image><image> that",
        "What is <image>",
    ],
)
def test_pictures_between_words_have_llavas_tokens(scheme, asked):
    """LLaVA's code tokenises the text on each side of a picture by itself; letters stand for sentencepiece's pieces."""
    letters = {chr(code): number for number, code in enumerate(range(32, 127), 5)} | {"\n": 3, "\u2581": 4}
    bare = Tokenizer(
        models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": 120} | letters, unk_token="<unk>")
    )
    bare.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False), pre_tokenizers.Split("", "isolated")]
    )
    bare.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bare, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<image>", normalized=False)]})
    processor = TextProcessor(tokenizer)
    turn = message(processor, "user", asked)
    text = tokenizer.apply_chat_template(
        [turn], chat_template=processor.chat_template, tokenize=False, add_generation_prompt=True
    )
    plain = VICUNA_V1.removeprefix("{{ bos_token }}")
    as_written = tokenizer.apply_chat_template(
        [{"role": "user", "content": asked}], chat_template=plain, tokenize=False, add_generation_prompt=True
    )
    blank = (
        "\u2581" if scheme == "first" else ""
    )  # sentencepiece's, before every text that is tokenised by itself
    chunks = [blank + chunk.replace(" ", "\u2581") if chunk else "" for chunk in as_written.split("<image>")]
    expected = [letters[letter] for letter in chunks[0]]
    for chunk in chunks[1:]:
        expected += [120, *(letters[letter] for letter in chunk)]
    assert tokenizer.encode(text.removeprefix("<s>"), add_special_tokens=False) == expected
