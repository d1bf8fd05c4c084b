"""The sizes of a LLaVA-like model that counting needs, from its ``config.json`` or from those that pmod ships."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pmod_cli.families.defaults import complete
from pmod_cli.output.errors import PmodError

_SHIPPED = Path(__file__).parent / "geometries"


@dataclass(frozen=True)
class Decoder:
    """The language model: a Llama-like decoder with gated MLP.

    Attributes:
        hidden: Width of the residual stream.
        kv_heads: Key and value heads (fewer than ``heads`` with grouped queries).
        intermediate: Width of the MLP.
        vocab: Rows of the embedding table and of the LM head.
        tied: Whether the LM head shares the embedding table.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    tied: bool


@dataclass(frozen=True)
class Tower:
    """A CLIP or SigLIP vision tower.

    Attributes:
        hidden: Width of the residual stream.
        layers: Number of layers, those after the selected feature layer included.
        used_layers: Layers that the selected feature depends on.
        features: Number of feature layers joined (1 unless the config selects several).
        intermediate: Width of the MLP.
        patch: Side of a patch, pixels.
        image: Side of the (square) input, pixels.
        has_cls: Whether there is a CLS token, and a norm before the layers (CLIP), or neither and a bias in the
            patch convolution (SigLIP).
        drops_first: Whether the first token, meant to be CLS, is kept from the projector (``default`` selection).
    """

    hidden: int
    layers: int
    used_layers: int
    features: int
    intermediate: int
    patch: int
    image: int
    channels: int
    has_cls: bool
    drops_first: bool

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image // self.patch

    @property
    def tokens(self) -> int:
        """Tokens inside the tower: patches and, if there is one, CLS."""
        return self.grid**2 + self.has_cls

    @property
    def selected(self) -> int:
        """Tokens of one crop that the projector sees."""
        return self.tokens - self.drops_first


@dataclass(frozen=True)
class Geometry:
    """A whole dense model.

    Attributes:
        model_type: transformers' name of the dense model.
        projector_bias: Whether the two projector layers have biases.
        pinpoints: Grids of tiles (anyres), (height, width) in pixels; empty if an image is always one crop.
        image_token: Id of the image placeholder.
        max_tiles: High-resolution features are shrunk to those of so many tiles; None for no limit.
        released_anyres: Whether the feature map is unpadded and shrunk as the paper's release does it.
    """

    model_type: str
    decoder: Decoder
    tower: Tower
    projector_bias: bool
    pinpoints: tuple[tuple[int, int], ...]
    image_token: int
    max_tiles: int | None
    released_anyres: bool

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Geometry:
        """Read a dense ``config.json``.

        Raises:
            PmodError: A size is none, or the vision tower is of another kind or has a pooling head, which no feature
                goes through.
        """
        config = complete(config)
        text, vision = config["text_config"], config["vision_config"]
        kind = vision["model_type"]
        if kind not in ("clip_vision_model", "siglip_vision_model"):
            raise PmodError(
                f"cannot count a vision tower of type {kind!r}",
                "supported: clip_vision_model, siglip_vision_model",
            )
        if kind == "siglip_vision_model" and vision.get("vision_use_head", True):
            raise PmodError("cannot count a SigLIP tower with a pooling head", "vision_use_head: false")
        selected = config["vision_feature_layer"]
        chosen = [selected] if isinstance(selected, int) else list(selected)
        attention_bias = bool(text.get("attention_bias"))
        limit = re.fullmatch(r"anyres_max_(\d+)", config.get("vision_aspect_ratio") or "")
        return cls(
            model_type=config["model_type"],
            decoder=Decoder(
                hidden=text["hidden_size"],
                layers=text["num_hidden_layers"],
                heads=text["num_attention_heads"],
                kv_heads=text.get("num_key_value_heads") or text["num_attention_heads"],
                head_dim=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
                intermediate=text["intermediate_size"],
                vocab=text["vocab_size"],
                # Qwen2's bias is part of its architecture, not a setting.
                qkv_bias=attention_bias or text["model_type"] == "qwen2",
                output_bias=attention_bias,
                mlp_bias=bool(text.get("mlp_bias")),
                tied=bool(config["tie_word_embeddings"] or text.get("tie_word_embeddings")),
            ),
            tower=Tower(
                hidden=vision["hidden_size"],
                layers=vision["num_hidden_layers"],
                # hidden_states has layers + 1 entries: index 0 is the embedding, -1 the last layer's output.
                used_layers=max(index % (vision["num_hidden_layers"] + 1) for index in chosen),
                features=len(chosen),
                intermediate=vision["intermediate_size"],
                patch=vision["patch_size"],
                image=vision["image_size"],
                channels=vision["num_channels"],
                has_cls=kind == "clip_vision_model",
                drops_first=config["vision_feature_select_strategy"] == "default",
            ),
            projector_bias=bool(config["multimodal_projector_bias"]),
            pinpoints=tuple((h, w) for h, w in config.get("image_grid_pinpoints") or ()),
            image_token=config["image_token_index"],
            max_tiles=int(limit[1]) if limit else config.get("max_num_patches"),
            released_anyres=bool(config.get("released_anyres")),
        )

    @property
    def original_vocab(self) -> int:
        """Vocabulary before the image token and padding rows were added for it.

        ``llava-hf`` appends them (32000 -> 32064 for Vicuna); a vocabulary whose image token lies elsewhere
        was not enlarged.
        """
        added = self.decoder.vocab - self.image_token
        return self.image_token if 0 < added <= 64 else self.decoder.vocab


@cache
def _load() -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_bytes()) for path in sorted(_SHIPPED.glob("*.json"))}


def shipped_geometries() -> list[str]:
    """Names of well-known models whose ``config.json`` is shipped, so that they are profiled offline."""
    return list(_load())


def find_geometry(name_or_hub_id: str) -> dict[str, Any] | None:
    """The shipped config of a model, by its name or by the hub id that it describes."""
    for name, entry in _load().items():
        if name_or_hub_id in (name, *entry["hub_ids"]):
            return dict(entry["config"])
    return None
