"""The few places where the supported transformers versions (5.17 and later) differ."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from transformers import LlamaModel

CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
"""What a forward pass calls the KV cache: ``past_key_values`` before transformers 5.24."""


def multimodal_output(output_class: type, outputs: Any, image_outputs: Any) -> Any:
    """The inner model's output from the language model's and the vision tower's.

    Args:
        output_class: E.g. ``LlavaModelOutputWithPast``.
        outputs: The language model's output.
        image_outputs: What ``get_image_features`` returned, or None.
    """
    fields = {item.name for item in dataclasses.fields(output_class)}
    if "image_outputs" in fields:
        return output_class(**outputs, image_outputs=image_outputs)
    features = None if image_outputs is None else image_outputs.pooler_output
    return output_class(**outputs, image_hidden_states=features)
