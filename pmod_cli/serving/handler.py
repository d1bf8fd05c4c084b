"""transformers' chat handler on a model that pmod loaded: its queue, its streaming, its answers' format.

Its own look-ups know transformers' model types alone, and its reading of a request takes any field and fetches any
picture. Both are replaced; what is inherited is private, and held by ``tests/serving``.
"""

from __future__ import annotations

import asyncio
import copy
from typing import Any

import torch
from fastapi import HTTPException
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.utils import GenerationState

from pmod_cli.families.processing import turn_of_parts
from pmod_cli.generation import DEFAULT_MAX_NEW_TOKENS, VisionLanguageModel, generation_settings
from pmod_cli.output.errors import PmodError
from pmod_cli.serving.pictures import PictureSources
from pmod_cli.serving.request import MOST_PIXELS, ChatRequest, Picture, read_request


class OneModel:
    """What transformers' server asks its model manager: here there is one model, for as long as the server runs."""

    def __init__(self, name: str) -> None:
        self.name = name

    def list_models(self) -> list[dict[str, Any]]:
        """The entries of ``/v1/models``."""
        return [{"id": self.name, "object": "model", "created": 0, "owned_by": "pmod"}]

    get_gen_models = list_models  # its name before transformers 5.24

    def shutdown(self) -> None:
        """The model ends with the process."""


class ChatHandler(ChatCompletionHandler):
    """Answers ``/v1/chat/completions``: prompts are read side by side, answers generated one after the other."""

    def __init__(self, model: VisionLanguageModel, name: str, sources: PictureSources) -> None:
        super().__init__(model_manager=OneModel(name), generation_state=GenerationState())
        if not model.processor.tokenizer.is_fast:
            raise PmodError("serving needs a fast tokenizer (tokenizer.json)")
        self.model, self.name, self.sources = model, name, sources

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """A response, or a stream; a `PmodError` for a bad request, 404 for another model."""
        request = read_request(body)
        if request.model not in ("", self.name):
            raise HTTPException(404, f"no model {request.model!r} here; this server has {self.name!r}")
        inputs = await asyncio.to_thread(self._encode, request)
        config = self._generation_config(request, inputs["input_ids"].shape[1])
        manager = self.generation_state.get_manager(self.name)
        if request.seed is not None:
            # In the thread that generates, right before this request's turn.
            manager.submit(torch.manual_seed, request.seed)
        given = request_id, self.model.model, self.model.processor, self.name, inputs, config, manager
        return self._streaming(*given) if request.stream else await self._non_streaming(*given)

    def _encode(self, request: ChatRequest) -> Any:
        images, turns, left = [], [], MOST_PIXELS
        for turn in request.messages:
            parts: list[str | None] = []
            for part in turn.content:
                if isinstance(part, Picture):
                    if turn.role != "user":
                        raise PmodError("only the user's messages may have pictures")
                    images.append(self.sources.open(part.image_url.url, left))
                    left -= images[-1].width * images[-1].height
                parts.append(None if isinstance(part, Picture) else part.text)
            turns.append(turn_of_parts(self.model.processor, turn.role, parts))
        return self.model.encode_chat(turns, images)

    def _generation_config(self, request: ChatRequest, prompt_tokens: int) -> Any:
        self.model.check_context(prompt_tokens, request.new_tokens or 1)
        room = self.model.context - prompt_tokens if self.model.context else DEFAULT_MAX_NEW_TOKENS
        new_tokens = request.new_tokens or min(DEFAULT_MAX_NEW_TOKENS, room)
        config = copy.deepcopy(self.model.model.generation_config)
        config.update(**generation_settings(request.sampling | {"max_new_tokens": new_tokens}))
        if self.model.cache == "static":
            config.cache_implementation = "static"
        return config
