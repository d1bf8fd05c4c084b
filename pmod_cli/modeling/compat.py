"""The few places where the supported transformers versions (5.17 and later) differ."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import LlamaModel

CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
"""What a forward pass calls the KV cache: ``past_key_values`` before transformers 5.24."""

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
"""Kinds of vision input, and what a forward pass calls their pixels.

What is already encoded stands under the kind in ``mm_encoder_outputs``, the token for which features are written is
``<kind>_token_id`` in the config, and ``get_<kind>_features`` encodes: the convention of transformers' ``generate``.
"""


@contextmanager
def encoded_inputs(model: nn.Module, forward: Any, inputs: dict[str, Any]) -> Iterator[None]:
    """Let a forward pass that has no ``mm_encoder_outputs``, as before transformers 5.24, take them all the same.

    Its own calls of ``get_image_features`` and the like are answered with what is already encoded.

    Args:
        model: The inner model.
        forward: Its dense class's method.
        inputs: Keyword arguments for it; changed in place.
    """
    known = "mm_encoder_outputs" in inspect.signature(forward).parameters
    encoded = {} if known else inputs.pop("mm_encoder_outputs", None) or {}
    answers = {kind: output for kind, output in encoded.items() if output is not None}
    for kind, output in answers.items():
        inputs[PIXELS[kind]] = torch.empty(1)
        setattr(model, f"get_{kind}_features", lambda *_, output=output, **__: output)
    try:
        yield
    finally:
        for kind in answers:
            delattr(model, f"get_{kind}_features")
