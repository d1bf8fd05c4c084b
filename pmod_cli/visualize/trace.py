"""Runs a prompt through a p-MoD model and keeps what its routers did, and what model and baseline answered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pmod_cli.generation import VisionLanguageModel, fitting
from pmod_cli.modeling import twin
from pmod_cli.output.errors import PmodError
from pmod_cli.prompts import Prompt
from pmod_cli.visualize.layout import Layout, lay_out


@dataclass(frozen=True)
class Trace:
    """What happened to a picture's vision tokens in one prefill.

    Attributes:
        layout: Where they lie on the picture.
        kept: Whether a layer processed a token, [layers, tokens]; all True in a dense layer.
        weights: Router weights, [layers, tokens]; NaN in a dense layer.
        ratios: Retention ratios by layer, None for a dense one.
    """

    layout: Layout
    kept: np.ndarray
    weights: np.ndarray
    ratios: list[float | None]

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return len(self.ratios)

    @property
    def survived(self) -> np.ndarray:
        """Number of layers that processed each token, [tokens]."""
        return self.kept.sum(0)


@torch.inference_mode()
def trace(loaded: VisionLanguageModel, prompt: Prompt) -> Trace:
    """Prefill a prompt with one picture and record every layer's routing.

    Raises:
        PmodError: The model is dense, or how it lays pictures out is not known.
    """
    model = loaded.model
    check_routes(model.config)
    [image] = prompt.images
    inputs = loaded.encode([prompt]).to(loaded.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with fitting():
        routing = model(**inputs, output_routing=True, use_cache=False, logits_to_keep=1).routing
    vision = inputs["input_ids"][0] == model.config.image_token_id
    layout = lay_out(model, loaded.processor.image_processor, image.size)
    count = int(vision.sum())
    if layout.tokens != count:
        raise PmodError(
            f"the picture has {count} vision tokens, and {layout.tokens} were expected of its size",
            "the checkpoint's processor and config disagree, or its layout is not known here",
        )
    kept = np.ones((len(routing), count), dtype=bool)
    weights = np.full((len(routing), count), np.nan, dtype=np.float32)
    for index, layer in enumerate(routing):
        if layer is not None:
            kept[index] = layer.kept[0, vision].cpu()
            weights[index] = layer.weights[0, vision].float().cpu()
    return Trace(layout, kept, weights, list(model.config.mod_config.retention_ratios))


def check_routes(config: Any) -> None:
    """Refuse a dense model.

    Raises:
        PmodError: It is one.
    """
    if not hasattr(config, "mod_config"):
        raise PmodError("the model is dense: it routes no tokens", "make a p-MoD model with `pmod convert`")


def dense_twin(loaded: VisionLanguageModel) -> VisionLanguageModel:
    """The same weights, shared, without routers: what the p-MoD model would say if it dropped nothing."""
    model = loaded.model
    # The same class with no Mixture-of-Depths layer: pictures are laid out as before.
    config = type(model.config).from_dict(model.config.to_dict() | {"mod": None})
    dtype = str(model.dtype).removeprefix("torch.")
    return VisionLanguageModel(twin.dense_twin(model, config, dtype), loaded.processor)
