"""The sizes of a LLaVA-like model that counting needs, from its ``config.json`` or from those that pmod ships."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pmod_cli.families import find_family
from pmod_cli.families.defaults import complete
from pmod_cli.families.tiling import Cutting, cutting
from pmod_cli.output.errors import PmodError
from pmod_cli.profiling.towers import Projector, Tower, read_vision

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
        head_norms: Whether queries and keys have norms of their own.
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
    head_norms: bool


@dataclass(frozen=True)
class Geometry:
    """A whole dense model.

    Attributes:
        model_type: transformers' name of the dense model.
        pinpoints: Grids of tiles (anyres), (height, width) in pixels; empty if an image is cut in another way.
        image_token: Id of the image placeholder.
        max_tiles: High-resolution features are shrunk to those of so many tiles; None for no limit.
        released_anyres: Whether the feature map is unpadded and shrunk as the paper's release does it.
        pictures: What the image processor's settings say about how it cuts pictures (`tiling.cutting`).
    """

    model_type: str
    decoder: Decoder
    tower: Tower
    projector: Projector
    pinpoints: tuple[tuple[int, int], ...]
    image_token: int
    max_tiles: int | None
    released_anyres: bool
    pictures: Cutting | None

    @classmethod
    def from_config(cls, config: dict[str, Any], pictures: dict[str, Any] | None = None) -> Geometry:
        """Read a dense ``config.json`` and, where pictures are cut by them, its image processor's settings.

        Raises:
            PmodError: The family is not listed, a size is none, or the vision tower is of another kind or has a
                pooling head, which no feature goes through.
        """
        if not find_family(config["model_type"], unlisted=True).listed:
            raise PmodError(f"cannot count {config['model_type']}: only families that pmod lists are counted")
        config = complete(config)
        text = config["text_config"]
        tower, projector = read_vision(config)
        attention_bias = bool(text.get("attention_bias"))
        limit = re.fullmatch(r"anyres_max_(\d+)", config.get("vision_aspect_ratio") or "")
        token = config.get("image_token_index")
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
                qkv_bias=attention_bias or text["model_type"].startswith("qwen2"),
                output_bias=attention_bias,
                mlp_bias=bool(text.get("mlp_bias")),
                tied=bool(config["tie_word_embeddings"] or text.get("tie_word_embeddings")),
                head_norms=text["model_type"].startswith("qwen3"),
            ),
            tower=tower,
            projector=projector,
            pinpoints=tuple((h, w) for h, w in config.get("image_grid_pinpoints") or ()),
            image_token=config["image_token_id"] if token is None else token,
            max_tiles=int(limit[1]) if limit else config.get("max_num_patches"),
            released_anyres=bool(config.get("released_anyres")),
            pictures=cutting(config, pictures or {}),
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
    """The shipped entry of a model, by its name or by a hub id that it describes.

    Its ``config`` is the dense ``config.json``, ``pictures`` the image processor's settings if they matter.
    """
    for name, entry in _load().items():
        if name_or_hub_id in (name, *entry["hub_ids"]):
            return copy.deepcopy(entry)  # what a caller changes stays its own
    return None
