"""Labels, token by token."""

from __future__ import annotations

import copy

import pytest

from pmod_cli.data.chat import ChatEncoder
from pmod_cli.data.records import BadSample, Turn
from pmod_cli.families.chat_templates import VICUNA_V1
from pmod_cli.output.errors import PmodError

LLAVA_HF = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for content in message['content'] %}"
    "{{ '<image>' if content['type'] == 'image' else content['text'] }}{% endfor %}"
    "{{ '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURNS = (
    Turn("user", "<image>\nWhere is the circle?"),
    Turn("assistant", "left"),
    Turn("user", "What colour is it?"),
    Turn("assistant", "dark red"),
)


def _with_template(processor, template):
    changed = copy.copy(processor)
    changed.chat_template = template
    return changed


def _learned(encoder, encoded):
    """The labelled tokens, as runs of text."""
    runs, current = [], []
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        if label == -100:
            if current:
                runs.append(encoder.tokenizer.decode(current))
            current = []
        else:
            assert label == token
            current.append(token)
    return [*runs, encoder.tokenizer.decode(current)] if current else runs


def _pieces(processor, template):
    """The conversation by hand: (token ids, whether they are learned), piece by piece."""
    tokenizer = processor.tokenizer

    def ids(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    pictures = [tokenizer.convert_tokens_to_ids("<image>")] * 3
    first, second = ids("\nWhere is the circle? ASSISTANT:"), ids("USER: What colour is it? ASSISTANT:")
    system = ids(
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: "
    )
    return [
        (bos, False),
        (system if template is VICUNA_V1 else ids("USER: "), False),
        (pictures, False),
        (first, False),
        (ids(" left"), True),
        (eos, True),
        (second, False),
        (ids(" dark red"), True),
        (eos, True),
    ]


@pytest.mark.parametrize("template", [None, LLAVA_HF, VICUNA_V1], ids=["demo", "llava-hf", "vicuna v1"])
def test_each_token(processor, template):
    changed = processor if template is None else _with_template(processor, template)
    got = ChatEncoder(changed, 2048).encode(TURNS, [[processor.image_token_id] * 3])
    pieces = _pieces(processor, template)
    assert got.input_ids == [token for piece, _ in pieces for token in piece]
    assert got.labels == [token if learned else -100 for piece, learned in pieces for token in piece]


@pytest.mark.parametrize("template", [LLAVA_HF, VICUNA_V1, CHATML], ids=["llava-hf", "vicuna", "chatml"])
def test_other_templates_learn_answers_and_their_end(processor, template):
    encoder = ChatEncoder(_with_template(processor, template), 2048)
    blank = "" if template == CHATML else " "
    encoded = encoder.encode(TURNS, [[processor.image_token_id] * 3])
    assert _learned(encoder, encoded) == [f"{blank}left</s>", f"{blank}dark red</s>"]
    bos = processor.tokenizer.bos_token_id
    assert encoded.input_ids.count(bos) == 1
    assert encoded.input_ids[0] == bos


def test_llava_hf_template_gets_an_end_of_turn_in_place_of_its_blank(processor):
    encoder = ChatEncoder(_with_template(processor, LLAVA_HF), 2048)
    text, spans = encoder.render(TURNS)
    assert text == (
        "USER: <image>\nWhere is the circle? ASSISTANT: left</s>USER: What colour is it? ASSISTANT: dark red</s>"
    )
    assert [text[a:b] for a, b in spans] == [" left</s>", " dark red</s>"]


def test_vicuna_v1_is_the_published_format(processor):
    text, _ = ChatEncoder(_with_template(processor, VICUNA_V1), 2048).render(TURNS)
    assert text == (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nWhere is the circle? "
        "ASSISTANT: left</s>USER: What colour is it? ASSISTANT: dark red</s>"
    )


def test_same_ids_as_the_processor(processor):
    from PIL import Image

    encoder = ChatEncoder(processor, 2048)
    image = Image.new("RGB", (80, 80), "red")
    text, _ = encoder.render(TURNS)
    theirs = processor(images=image, text=text, return_tensors="pt")["input_ids"][0].tolist()
    assert encoder.encode(TURNS, [[processor.image_token_id] * 100]).input_ids == theirs


def test_template_that_rewrites_is_refused(processor):
    template = "{{ messages | length }}" + LLAVA_HF
    with pytest.raises(PmodError, match="rewrites earlier text"):
        ChatEncoder(_with_template(processor, template), 2048).render(TURNS)


def test_too_long(processor):
    full = ChatEncoder(processor, 2048).encode(TURNS, [[processor.image_token_id] * 3])
    first = full.labels.index(next(label for label in full.labels if label != -100))
    cut = ChatEncoder(processor, first + 1).encode(TURNS, [[processor.image_token_id] * 3])
    assert cut.labels == full.labels[: first + 1]
    with pytest.raises(BadSample, match="no answer within"):
        ChatEncoder(processor, first).encode(TURNS, [[processor.image_token_id] * 3])
    with pytest.raises(BadSample, match="an image past"):
        ChatEncoder(processor, 4).encode(TURNS, [[processor.image_token_id] * 3])


@pytest.mark.parametrize("template", [None, LLAVA_HF, VICUNA_V1, CHATML])
@pytest.mark.parametrize("limit", [2048, 60])
def test_lengths_of_many_are_those_of_each(processor, template, limit):
    changed = processor if template is None else _with_template(processor, template)
    encoder = ChatEncoder(changed, limit)
    talks = [TURNS, TURNS[:2], (Turn("user", "Why?"), Turn("assistant", "so " * 80)), TURNS[2:], TURNS]
    talks += [(Turn("user", "x" * 80), Turn("assistant", "y"))]
    for _ in range(2):  # each form is known the second time
        texts = [encoder.text(talk) for talk in talks]
        assert texts == [encoder.render(talk)[0] for talk in talks]
        for talk, ids in zip(talks, encoder.token_ids(texts), strict=True):
            images = [[processor.image_token_id] * 3] * sum(turn.images for turn in talk)
            try:
                expected = len(encoder.encode(talk, images).input_ids)
            except BadSample as error:
                with pytest.raises(BadSample, match=str(error)):
                    encoder.length(talk, ids, images)
            else:
                assert encoder.length(talk, ids, images) == expected


@pytest.mark.parametrize(
    "template", [None, LLAVA_HF, VICUNA_V1, CHATML], ids=["demo", "llava-hf", "vicuna", "chatml"]
)
@pytest.mark.parametrize("system", [(), (Turn("system", "Be brief."),)], ids=["", "system"])
def test_many_turns_are_rendered_piece_by_piece_as_at_once(processor, template, system, monkeypatch):
    encoder = ChatEncoder(processor if template is None else _with_template(processor, template), 2048)
    pairs = [(Turn("user", f"What is {k}?"), Turn("assistant", f"It is {k}.")) for k in range(9)]
    turns = [*system, *(turn for pair in pairs for turn in pair)]
    whole = encoder.render(turns)
    monkeypatch.setattr("pmod_cli.data.chat._FEW", 2)
    assert encoder.render(turns) == whole


def test_many_turns_take_a_time_that_grows_with_them(processor, monkeypatch):
    encoder = ChatEncoder(processor, 2048)
    rendered, seen = encoder._rendered, []

    def counted(conversations, **options):
        seen.extend(map(len, conversations))
        return rendered(conversations, **options)

    monkeypatch.setattr(encoder, "_rendered", counted)
    encoder.render([Turn("user", "Why?"), Turn("assistant", "So.")] * 500)
    assert sum(seen) < 20 * 500


def test_a_template_that_counts_takes_few_turns_alone(processor):
    counting = CHATML.replace("'</s>\n'", "'</s>' + loop.index | string + '\n'")
    encoder = ChatEncoder(_with_template(processor, counting), 2048)
    pair = [Turn("user", "Why?"), Turn("assistant", "So.")]
    assert encoder.render(pair * 20)
    with pytest.raises(BadSample, match="too many turns: 40 answers"):
        encoder.render(pair * 40)
