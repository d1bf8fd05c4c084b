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

from pmod_cli.data.records import BadSample, Turn
from pmod_cli.output.errors import PmodError, told_as

IGNORED = -100


@dataclass(frozen=True)
class Encoded:
    """Token ids with each image placeholder expanded, and labels (-100 outside the assistant's turns)."""

    input_ids: list[int]
    labels: list[int]


class ChatEncoder:
    """Encodes conversations for a processor with a fast tokenizer and a chat template; cuts them at a length."""

    def __init__(self, processor: Any, max_length: int) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.max_length = max_length
        if not processor.chat_template:
            raise PmodError(
                "the processor has no chat template", "train.chat_template=vicuna_v1 gives it one"
            )
        if not self.tokenizer.is_fast:
            raise PmodError("fine-tuning needs a fast tokenizer (tokenizer.json)")
        self.image_token_id = self.tokenizer.convert_tokens_to_ids(processor.image_token)
        other = {processor.image_token, self.tokenizer.bos_token, self.tokenizer.unk_token}
        self._ends = set(self.tokenizer.all_special_tokens) - (other - {self.tokenizer.eos_token})

    def encode(self, turns: Sequence[Turn], image_tokens: Sequence[int]) -> Encoded:
        """Encode one conversation; ``image_tokens`` says how many tokens each image takes.

        Raises:
            BadSample: No answer or not every image is within the maximum length; images and placeholders differ.
            PmodError: The template does not only append.
        """
        text, spans = self.render(turns)
        has_bos = bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)
        tokens = self.tokenizer(text, add_special_tokens=not has_bos, return_offsets_mapping=True)
        ids: list[int] = []
        labels: list[int] = []
        images, span = 0, 0
        for token, (start, end) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True):
            if token == self.image_token_id:
                if images == len(image_tokens):
                    raise BadSample("<image> count", "a placeholder too many after the chat template")
                ids += [token] * image_tokens[images]
                labels += [IGNORED] * image_tokens[images]
                images += 1
                continue
            while span < len(spans) and spans[span][1] <= start:
                span += 1
            # A token such as "▁red" may begin with the blank before the answer: the model has to say it, too.
            answers = span < len(spans) and start < end and end > spans[span][0]
            ids.append(token)
            labels.append(token if answers else IGNORED)
        if images != len(image_tokens):
            raise BadSample("<image> count", f"{images} placeholders, {len(image_tokens)} images")
        if self.image_token_id in ids[self.max_length :]:
            raise BadSample("too long", f"an image past {self.max_length} tokens")
        ids, labels = ids[: self.max_length], labels[: self.max_length]
        if all(label == IGNORED for label in labels):
            raise BadSample("too long", f"no answer within {self.max_length} tokens")
        return Encoded(ids, labels)

    def render(self, turns: Sequence[Turn]) -> tuple[str, list[tuple[int, int]]]:
        """The text and the (start, end) characters of each answer with its end-of-turn token."""
        messages = [
            {
                "role": turn.role,
                "content": [{"type": "image"}] * turn.images + [{"type": "text", "text": turn.text}],
            }
            for turn in turns
        ]
        apply = partial(self.processor.apply_chat_template, tokenize=False)
        text, previous = "", ""  # ours, and the template's, which may lack end-of-turn tokens
        spans: list[tuple[int, int]] = []
        for index, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            with told_as("the processor's chat template fails"):
                asked = apply(messages[:index], add_generation_prompt=True)
                answered = apply(messages[: index + 1], add_generation_prompt=False)
            if not asked.startswith(previous) or not answered.startswith(asked):
                raise PmodError(
                    "the processor's chat template rewrites earlier text as the conversation grows",
                    "set train.chat_template=vicuna_v1, or give the processor a template that only appends",
                )
            text += asked[len(previous) :]
            answer, rest = self._end_of_turn(answered[len(asked) :])
            spans.append((len(text), len(text) + len(answer)))
            text += answer + rest
            previous = answered
        return text, spans

    def _end_of_turn(self, answer: str) -> tuple[str, str]:
        """Split what a turn adds into the answer with its end-of-turn token, and the rest."""
        stripped = answer.rstrip()
        if any(stripped.endswith(token) for token in self._ends):
            return stripped, answer[len(stripped) :]
        return stripped + self.tokenizer.eos_token, ""
