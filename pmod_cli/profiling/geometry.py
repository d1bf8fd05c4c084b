"""The sizes of a LLaVA-like model that counting needs, read from its ``config.json``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from pmod_cli.families.defaults import complete
from pmod_cli.output.errors import PmodError


@dataclass(frozen=True)
class Decoder:
    """The language model: a Llama-like decoder with gated MLP.

    Attributes:
        hidden: Width of the residual stream.
        layers: Number of decoder layers.
        heads: Query heads.
        kv_heads: Key and value heads (fewer than ``heads`` with grouped queries).
        head_dim: Width of one head.
        intermediate: Width of the MLP.
        vocab: Rows of the embedding table and of the LM head.
        qkv_bias: Whether the query, key and value projections have a bias.
        output_bias: Whether the attention's output projection has a bias.
        mlp_bias: Whether the MLP's projections have a bias.
        tied: Whether the LM head shares the embedding table.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False

    @classmethod
    def from_config(cls, config: dict[str, Any], tied: bool) -> Decoder:
        """Read a ``text_config``, defaults filled in."""
        heads = config["num_attention_heads"]
        attention_bias = bool(config.get("attention_bias"))
        return cls(
            hidden=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            intermediate=config["intermediate_size"],
            vocab=config["vocab_size"],
            # Qwen2's bias is part of its architecture, not a setting.
            qkv_bias=attention_bias or config["model_type"] == "qwen2",
            output_bias=attention_bias,
            mlp_bias=bool(config.get("mlp_bias")),
            tied=tied,
        )


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
        channels: Colour channels.
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

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Tower:
        """Read the vision side of a whole model's config, defaults filled in.

        Raises:
            PmodError: If the tower is of another kind, or has a pooling head, which no feature goes through.
        """
        vision = config["vision_config"]
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
        layers = vision["num_hidden_layers"]
        return cls(
            hidden=vision["hidden_size"],
            layers=layers,
            # hidden_states has layers + 1 entries: index 0 is the embedding, -1 the last layer's output.
            used_layers=max(index % (layers + 1) for index in chosen),
            features=len(chosen),
            intermediate=vision["intermediate_size"],
            patch=vision["patch_size"],
            image=vision["image_size"],
            channels=vision["num_channels"],
            has_cls=kind == "clip_vision_model",
            drops_first=config["vision_feature_select_strategy"] == "default",
        )


@dataclass(frozen=True)
class Geometry:
    """A whole dense model.

    Attributes:
        model_type: transformers' name of the dense model.
        decoder: Language model.
        tower: Vision tower.
        projector_bias: Whether the two projector layers have biases.
        pinpoints: Grids of tiles (anyres), (height, width) in pixels; empty for one crop an image.
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
    max_tiles: int | None = None
    released_anyres: bool = False

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Geometry:
        """Read a dense ``config.json``.

        Raises:
            PmodError: If the vision tower is not supported, or a size is none.
        """
        config = complete(config)
        text = config["text_config"]
        limit = re.fullmatch(r"anyres_max_(\d+)", config.get("vision_aspect_ratio") or "")
        tied = bool(config["tie_word_embeddings"] or text.get("tie_word_embeddings"))
        return cls(
            model_type=config["model_type"],
            decoder=Decoder.from_config(text, tied),
            tower=Tower.from_config(config),
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
