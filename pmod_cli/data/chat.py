"""A conversation as token ids and labels: the chat template's text, with loss on the assistant's turns only.

The template is rendered turn by turn: what a turn adds to the text so far is that turn's. That holds for any
template that only ever appends, and is checked. Labels include the end-of-turn token, without which a model
never learns to stop; a template that writes none (llava-hf's) gets the tokenizer's end-of-sequence token there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from pmod_cli.data.records import BadSample, Turn
from pmod_cli.families.chat_templates import PLACEHOLDER, check_length
from pmod_cli.families.processing import message, picture_ids
from pmod_cli.output.errors import PmodError, first_line, told_as

IGNORED = -100
_FEW = 32
"""Answers of a conversation up to which each is rendered after all that comes before it."""


@dataclass(frozen=True)
class Encoded:
    """Token ids with each image placeholder expanded, and labels (-100 outside the assistant's turns)."""

    input_ids: list[int]
    labels: list[int]


class ChatEncoder:
    """Encodes conversations for a processor with a fast tokenizer and a chat template; cuts them at a length.

    With the ``image_position`` ``front`` a conversation's only picture comes before its turn's words, as LLaVA's own
    code trains; with ``written`` all stay where the record has them.
    """

    def __init__(self, processor: Any, max_length: int, image_position: str = "written") -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.max_length, self.image_position = max_length, image_position
        if not processor.chat_template:
            raise PmodError(
                "the processor has no chat template", "train.chat_template=vicuna_v1 gives it one"
            )
        if not self.tokenizer.is_fast:
            raise PmodError("fine-tuning needs a fast tokenizer (tokenizer.json)")
        template = processor.chat_template
        # What `apply_chat_template` does, but for many conversations in a call.
        self._rendered = partial(
            render_jinja_template,
            chat_template=template["default"] if isinstance(template, dict) else template,
            **self.tokenizer.special_tokens_map,
        )
        self.image_token_id = self.tokenizer.convert_tokens_to_ids(processor.image_token)
        other = {processor.image_token, self.tokenizer.bos_token, self.tokenizer.unk_token}
        self._ended: dict[tuple[Any, ...], bool] = {}
        self._ends = set(self.tokenizer.all_special_tokens) - (other - {self.tokenizer.eos_token})

    def encode(self, turns: Sequence[Turn], pictures: Sequence[list[int]]) -> Encoded:
        """Encode one conversation; ``pictures`` are the ids that each picture becomes (`picture_ids`).

        Raises:
            BadSample: No answer or not every image is within the maximum length; images and placeholders differ.
            PmodError: The template does not only append.
        """
        text, spans = self.render(turns)
        special = self._adds_special_tokens(text)
        tokens = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        ids: list[int] = []
        labels: list[int] = []
        images, span = 0, 0
        for token, (start, end) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True):
            if token == self.image_token_id:
                if images == len(pictures):
                    raise BadSample("<image> count", "a placeholder too many after the chat template")
                ids += pictures[images]
                labels += [IGNORED] * len(pictures[images])
                images += 1
                continue
            while span < len(spans) and spans[span][1] <= start:
                span += 1
            # A token such as "▁red" may begin with the blank before the answer: the model has to say it, too.
            answers = span < len(spans) and start < end and end > spans[span][0]
            ids.append(token)
            labels.append(token if answers else IGNORED)
        if images != len(pictures):
            raise BadSample("<image> count", f"{images} placeholders, {len(pictures)} images")
        if self.image_token_id in ids[self.max_length :]:
            raise BadSample("too long", f"an image past {self.max_length} tokens")
        ids, labels = ids[: self.max_length], labels[: self.max_length]
        if all(label == IGNORED for label in labels):
            raise BadSample("too long", f"no answer within {self.max_length} tokens")
        return Encoded(ids, labels)

    def picture_ids(self, sizes: Sequence[tuple[int, int]]) -> list[list[int]]:
        """What the pictures of one conversation, (width, height) each, become; `BadSample` if they cannot be taken."""
        try:
            return picture_ids(self.processor, sizes)
        except PmodError as error:  # the image processor's, of a shape that it does not take
            raise BadSample("unusable image", first_line(error)) from error

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts that `text` made, one per image; many at once take the cores that there are."""
        backend = self.tokenizer.backend_tokenizer
        # As transformers' own call does first. A cut or padding that is set would change what is counted.
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        special = bool(texts) and self._adds_special_tokens(texts[0])  # all are of one template
        return [found.ids for found in backend.encode_batch_fast(list(texts), add_special_tokens=special)]

    def length(self, turns: Sequence[Turn], ids: Sequence[int], pictures: Sequence[list[int]]) -> int:
        """How many tokens `encode` gives a conversation with these `token_ids`; it raises what `encode` does."""
        length = len(ids) + sum(map(len, pictures)) - len(pictures)
        if length <= self.max_length and ids.count(self.image_token_id) == len(pictures):
            return length  # nothing is cut off, so there are answers to learn
        return len(self.encode(turns, pictures).input_ids)

    def _adds_special_tokens(self, text: str) -> bool:
        return not (self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token))

    def render(self, turns: Sequence[Turn]) -> tuple[str, list[tuple[int, int]]]:
        """The text and the (start, end) characters of each answer with its end-of-turn token."""
        messages = self._messages(turns)
        places = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
        text = ""
        spans: list[tuple[int, int]] = []
        for question, added in self._added(messages, places):
            text += question
            answer, rest = self._end_of_turn(added)
            spans.append((len(text), len(text) + len(answer)))
            text += answer + rest
        return text, spans

    def _added(self, messages: list[dict[str, Any]], places: list[int]) -> list[tuple[str, str]]:
        """What the template writes up to each answer, and for it, the end-of-turn token not always included.

        Many answers are rendered after the one before alone, which takes a time linear in their number. What that
        gives must be what the template writes of the whole.
        """
        many = len(places) > _FEW
        head = messages[: places[0] - 1]  # the system's turn
        before = [
            [*head, *messages[max(len(head), place - 3) if many else len(head) : place - 1]]
            for place in places
        ]
        last = [[*start, messages[place - 1]] for start, place in zip(before, places, strict=True)]
        prompts = self._apply(last, add_generation_prompt=True)
        ends = [[*start, messages[place]] for start, place in zip(last, places, strict=True)]
        whole = self._apply(ends, add_generation_prompt=False)
        starts = self._apply(before[1:], add_generation_prompt=False) if many else whole[:-1]
        added = []
        for previous, asked, answered in zip(["", *starts], prompts, whole, strict=True):
            if not asked.startswith(previous) or not answered.startswith(asked):
                raise PmodError(
                    "the processor's chat template rewrites earlier text as the conversation grows",
                    "set train.chat_template=vicuna_v1, or give the processor a template that only appends",
                )
            added.append((asked[len(previous) :], answered[len(asked) :]))
        if (
            many
            and "".join(question + answer for question, answer in added)
            != self._apply([messages[: places[-1] + 1]], add_generation_prompt=False)[0]
        ):
            raise BadSample(
                "too many turns", f"{len(places)} answers, and the chat template takes no more than {_FEW}"
            )
        return added

    def text(self, turns: Sequence[Turn]) -> str:
        """The text of `render`. Of conversations of one form, only the first is rendered answer by answer.

        Where the template itself ended all turns of that one, the others' texts are what it writes in one go.
        """
        messages = self._messages(turns)
        form = tuple((each["role"], len(each["content"])) for each in messages)
        if self._ended.get(form):
            return self._apply([messages], add_generation_prompt=False)[0]
        text, _ = self.render(turns)
        if form not in self._ended:
            self._ended[form] = self._apply([messages], add_generation_prompt=False)[0] == text
        return text

    @told_as("the processor's chat template fails")
    def _apply(self, conversations: list[list[dict[str, Any]]], *, add_generation_prompt: bool) -> list[str]:
        texts, _ = self._rendered(conversations, add_generation_prompt=add_generation_prompt)
        for text in texts:
            check_length(text)
        return list(texts)

    def _messages(self, turns: Sequence[Turn]) -> list[dict[str, Any]]:
        if self.moves(turns):
            turns = [Turn(turn.role, PLACEHOLDER + turn.words) if turn.images else turn for turn in turns]
        return [message(self.processor, turn.role, self._text(turn)) for turn in turns]

    def moves(self, turns: Sequence[Turn]) -> bool:
        """Whether ``image_position`` moves a picture: the only one, not in front where the record has it."""
        return (
            self.image_position == "front"
            and sum(turn.images for turn in turns) == 1
            and not any(turn.text.startswith(PLACEHOLDER) for turn in turns)
        )

    def _text(self, turn: Turn) -> str:
        """An answer loses the end-of-turn tokens that it already has: the template, or we, write one."""
        text = turn.text
        while turn.role == "assistant" and (end := next(filter(text.endswith, self._ends), None)):
            text = text.removesuffix(end).rstrip()
        return text

    def _end_of_turn(self, answer: str) -> tuple[str, str]:
        """Split what a turn adds into the answer with its end-of-turn token, and the rest."""
        stripped = answer.rstrip()
        if any(stripped.endswith(token) for token in self._ends):
            return stripped, answer[len(stripped) :]
        return stripped + self.tokenizer.eos_token, ""
