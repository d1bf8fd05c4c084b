"""The few places where the supported transformers versions (5.17 and later) differ."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from transformers import LlamaModel

CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
"""What a forward pass calls the KV cache: ``past_key_values`` before transformers 5.24."""


def multimodal_output(output_class: type, outputs: Any, encoded: dict[str, Any]) -> Any:
    """The inner model's output from the language model's and the vision tower's.

    Args:
        output_class: E.g. ``LlavaModelOutputWithPast``.
        outputs: The language model's output.
        encoded: What ``get_image_features`` and the like returned, or None, by kind (``image``, ``video``).
    """
    fields = {item.name for item in dataclasses.fields(output_class)}
    values = {}
    for kind, output in encoded.items():
        if f"{kind}_outputs" in fields:
            values[f"{kind}_outputs"] = output
        elif output is not None:
            values[f"{kind}_hidden_states"] = output.pooler_output
    return output_class(**outputs, **values)
