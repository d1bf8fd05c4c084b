"""What a chat request may say: OpenAI's fields, as far as they mean something here, and no others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    ValidationError,
    model_validator,
)

from pmod_cli.output.errors import PmodError

LARGEST = 32 * 2**20
"""Bytes of a request's body."""

MOST_PIXELS = 2**26
"""Of all pictures of a request: decoding them and the processor take about 25 bytes each."""

_MOST_PICTURES = 32
_MOST_TURNS = 1000
_LONGEST = 10**6
"""Characters of all texts; no model reads as many, and tokenizers take seconds and gigabytes for more."""

_GREEDY = 1e-5
"""A temperature below it is greedy, as in vLLM: logits over a tiny one are infinite."""


class _Part(BaseModel):
    """Null is the same as nothing: clients send back the answers that they got, with all their empty fields."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        return {name: value for name, value in given.items() if value is not None}


class Text(_Part):
    """Words of a turn."""

    type: Literal["text"]
    text: str


class _Address(_Part):
    url: str
    detail: str = "auto"


class Picture(_Part):
    """A picture of a turn; ``detail`` is taken and changes nothing."""

    type: Literal["image_url"]
    image_url: _Address


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Turn(_Part):
    """One message."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[
        list[Annotated[Text | Picture, Field(discriminator="type")]],
        FailFast(),
        Field(max_length=_MOST_TURNS),
        BeforeValidator(_as_parts),
    ]
    name: str = ""


class _Plain(_Part):
    type: Literal["text"]


class ChatRequest(_Part):
    """A request to ``/v1/chat/completions``.

    What would change the answer in a way that pmod has not may only have the value that changes nothing.
    """

    model: str = ""
    messages: Annotated[list[Turn], FailFast()] = Field(min_length=1, max_length=_MOST_TURNS)
    stream: bool = False
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)

    n: Literal[1] = 1
    logprobs: Literal[False] = False
    frequency_penalty: Literal[0] = 0
    presence_penalty: Literal[0] = 0
    response_format: _Plain | None = None
    tools: list[Any] = Field([], max_length=0)
    stop: list[Any] = Field([], max_length=0)

    stream_options: dict[str, Any] = {}
    user: str = ""
    metadata: dict[str, Any] = {}
    store: bool = False

    @model_validator(mode="after")
    def _can_be_meant(self) -> ChatRequest:
        parts = [part for turn in self.messages for part in turn.content]
        texts = [len(part.text) for part in parts if isinstance(part, Text)]
        if len(parts) - len(texts) > _MOST_PICTURES:
            raise ValueError(f"it has {len(parts) - len(texts)} pictures, and may have {_MOST_PICTURES}")
        if any(re.search("[\ud800-\udfff]", part.text) for part in parts if isinstance(part, Text)):
            raise ValueError("a text in it has half of a surrogate pair, which is no character")
        if sum(texts) > _LONGEST:
            raise ValueError(f"it has {sum(texts):,} characters of text, and may have {_LONGEST:,}")
        return self

    @property
    def new_tokens(self) -> int | None:
        """The longest answer that is asked for."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def sampling(self) -> dict[str, Any]:
        """Settings of `generate`: greedy, unless the request says how to sample."""
        asked = self.temperature is not None or self.top_p is not None
        temperature = 1.0 if self.temperature is None else self.temperature
        return {
            "do_sample": asked and temperature >= _GREEDY,
            "temperature": temperature,
            "top_p": self.top_p,
        }


_WITHOUT_CHOICE = {
    (name,)
    for name in (
        "n", "logprobs", "frequency_penalty", "presence_penalty", "response_format", "tools", "stop",
    )
}  # fmt: skip


def read_request(body: Any) -> ChatRequest:
    """Read a request's JSON; a `PmodError` says in one line what is wrong with it."""
    try:
        return ChatRequest.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(step) for step in first["loc"] if step not in ("text", "image_url"))
        unknown = first["type"] == "extra_forbidden" or first["loc"][:1] in _WITHOUT_CHOICE
        wrong = "not supported" if unknown else first["msg"].removeprefix("Value error, ")
        raise PmodError(f"{where or 'the request'}: {wrong}") from None
