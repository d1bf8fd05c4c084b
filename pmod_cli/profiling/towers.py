"""Sizes of vision towers and projectors that counting needs, from a model's ``config.json``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pmod_cli.output.errors import PmodError

Pair = tuple[int, int]


@dataclass(frozen=True)
class Tower:
    """A vision transformer.

    Attributes:
        hidden: Width of the residual stream.
        layers: Number of layers, those after the selected feature layer included.
        used_layers: Layers that the selected feature depends on.
        layer_weights: What each token is multiplied with in a layer.
        patch: Side of a patch, pixels.
        channels: Of the picture.
        image: Side of the (square) input, pixels; None where a picture keeps its own shape.
        layer_parameters: Of one layer.
        outer_parameters: Of all outside the layers.
        layer_norms: LayerNorms in a layer; RMSNorms do not count.
        outer_norms: LayerNorms outside, on the way to the selected feature.
        frames: Frames of a video, or copies of a picture, that a patch spans.
        merge: Patches along a side of one token for the decoder.
        has_cls: Whether there is a CLS token.
        drops_first: Whether the first token, meant to be CLS, is kept from the projector (``default`` selection).
        window: Side of the windows of attention, in merged tokens.
        windowed: How many of the used layers attend within windows only.
    """

    hidden: int
    layers: int
    used_layers: int
    layer_weights: int
    patch: int
    channels: int
    image: int | None
    layer_parameters: int
    outer_parameters: int
    layer_norms: int = 2
    outer_norms: int = 0
    frames: int = 1
    merge: int = 1
    has_cls: bool = False
    drops_first: bool = False
    window: int = 1
    windowed: int = 0

    @property
    def grid(self) -> int:
        """Patches along one side of a square input."""
        return (self.image or 0) // self.patch

    @property
    def selected(self) -> int:
        """Tokens that one square input becomes behind the projector."""
        return self.rows((self.grid, self.grid))

    def tokens(self, grid: Pair) -> int:
        """Tokens inside the tower, of an input of so many patches (down, across): patches and, if there is one, CLS."""
        return grid[0] * grid[1] + self.has_cls

    def rows(self, grid: Pair) -> int:
        """Tokens that the projector gives for such an input."""
        return (self.tokens(grid) - self.drops_first) // self.merge**2

    def pairs(self, grid: Pair) -> int:
        """Query-key pairs of attention in all used layers together, for one head."""
        full = self.tokens(grid) ** 2
        sides = [side // self.merge for side in grid]
        # Windows are laid from the upper left corner; those at the lower and right edge may be smaller.
        squares = [side // self.window * self.window**2 + (side % self.window) ** 2 for side in sides]
        within = squares[0] * squares[1] * self.merge**4
        return (self.used_layers - self.windowed) * full + self.windowed * within

    @property
    def patch_weights(self) -> int:
        """What each patch is multiplied with to become a token."""
        return self.channels * self.patch**2 * self.frames * self.hidden


@dataclass(frozen=True)
class Projector:
    """What makes the tower's features the decoder's tokens.

    Attributes:
        weights: What each token is multiplied with.
        parameters: Of all of it.
        normed: Values for each token that go through LayerNorms.
    """

    weights: int
    parameters: int
    normed: int = 0


def read_vision(config: dict[str, Any]) -> tuple[Tower, Projector]:
    """Tower and projector of a completed dense ``config.json``; `PmodError` if its kind cannot be counted."""
    kind = config["vision_config"]["model_type"]
    if kind not in _READERS:
        raise PmodError(f"cannot count a vision tower of type {kind!r}", f"supported: {', '.join(_READERS)}")
    return _READERS[kind](config)


def _clip(config: dict[str, Any]) -> tuple[Tower, Projector]:
    """CLIP or SigLIP, with LLaVA's projector."""
    vision, width = config["vision_config"], config["text_config"]["hidden_size"]
    clip = vision["model_type"] == "clip_vision_model"
    if not clip and vision.get("vision_use_head", True):
        raise PmodError("cannot count a SigLIP tower with a pooling head", "vision_use_head: false")
    selected = config["vision_feature_layer"]
    chosen = [selected] if isinstance(selected, int) else list(selected)
    hidden, layers = vision["hidden_size"], vision["num_hidden_layers"]
    tower = Tower(
        # hidden_states has layers + 1 entries: index 0 is the embedding, -1 the last layer's output.
        used_layers=max(index % (layers + 1) for index in chosen),
        outer_norms=int(clip),
        has_cls=clip,
        drops_first=config["vision_feature_select_strategy"] == "default",
        **_plain(vision, outer_parameters=2 * hidden * (1 + clip), positions=clip),
    )
    bias = bool(config["multimodal_projector_bias"])
    weights = width * (len(chosen) * hidden + width)
    newline = width if config.get("image_grid_pinpoints") else 0
    return tower, Projector(weights, weights + 2 * width * bias + newline)


def _plain(vision: dict[str, Any], outer_parameters: int, positions: int) -> dict[str, Any]:
    """Sizes of a tower as CLIP's; it has so many positions beside those of its patches."""
    hidden, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    channels, patches = vision["num_channels"], (vision["image_size"] // vision["patch_size"]) ** 2
    return {
        "hidden": hidden,
        "layers": vision["num_hidden_layers"],
        "layer_weights": 4 * hidden**2 + 2 * hidden * inner,
        "patch": patch,
        "channels": channels,
        "image": vision["image_size"],
        # Four projections, two of the MLP, their biases, two norms.
        "layer_parameters": 4 * (hidden**2 + hidden) + (2 * hidden + 1) * inner + hidden + 4 * hidden,
        # CLIP's class embedding, or the bias of SigLIP's patch convolution: a vector either way.
        "outer_parameters": outer_parameters + hidden * (1 + channels * patch**2 + patches + positions),
    }


def _idefics(config: dict[str, Any]) -> tuple[Tower, Projector]:
    """SigLIP up to its last norm, and one matrix for the patches that become one token."""
    vision, merge = config["vision_config"], config["scale_factor"]
    hidden, layers = vision["hidden_size"], vision["num_hidden_layers"]
    tower = Tower(
        used_layers=layers,
        outer_norms=1,
        merge=merge,
        **_plain(vision, outer_parameters=2 * hidden, positions=0),
    )
    weights = hidden * merge**2 * config["text_config"]["hidden_size"]
    return tower, Projector(weights, weights)


def _internvl(config: dict[str, Any]) -> tuple[Tower, Projector]:
    """A CLIP-like tower with scaled branches, and a projector that begins with a norm."""
    vision, width = config["vision_config"], config["text_config"]["hidden_size"]
    image, patch = (_one(vision[key]) for key in ("image_size", "patch_size"))
    hidden, layers, selected = (
        vision["hidden_size"],
        vision["num_hidden_layers"],
        config["vision_feature_layer"],
    )
    last = not vision["use_mean_pooling"]
    positions = (image // patch) ** 2 + 1 if vision["use_absolute_position_embeddings"] else 0
    sizes = _plain({**vision, "image_size": image, "patch_size": patch}, 0, 0)
    layer_norm = vision["norm_type"] == "layer_norm"
    tower = Tower(
        used_layers=selected % (layers + 1),
        layer_norms=2 * layer_norm,
        outer_norms=int(last and selected == -1),
        merge=round(1 / config["downsample_ratio"]),
        has_cls=True,
        drops_first=config["vision_feature_select_strategy"] == "default",
        **sizes
        | {
            "outer_parameters": hidden
            * (2 + vision["num_channels"] * patch**2 + positions + 2 * last + bool(vision["use_mask_token"])),
            "layer_parameters": sizes["layer_parameters"]
            + hidden
            * (
                2
                - 3 * (not vision["attention_bias"])
                - 2 * (not layer_norm)
                + 2 * bool(vision["use_qk_norm"])
            ),
        },
    )
    merged = hidden * tower.merge**2
    weights = width * (merged + width)
    return tower, Projector(weights, weights + 2 * width + 2 * merged, normed=merged)


def _qwen(config: dict[str, Any]) -> tuple[Tower, Projector]:
    """Qwen's towers: pictures keep their shape; the merger is the projector, and each DeepStack layer has one more."""
    vision = config["vision_config"]
    kind, depth, merge = vision["model_type"], vision["depth"], vision["spatial_merge_size"]
    first, gated, deep = kind == "qwen2_vl_vision", kind == "qwen2_5_vl_vision", kind == "qwen3_vl_vision"
    hidden = vision["embed_dim" if first else "hidden_size"]
    inner = hidden * vision["mlp_ratio"] if first else vision["intermediate_size"]
    mlp = (3 if gated else 2) * hidden * inner
    norm = hidden * (1 if gated else 2)
    patch, channels, frames = (
        _one(vision["patch_size"]),
        vision["in_channels"],
        _one(vision["temporal_patch_size"]),
    )
    windowed = depth - len({index % depth for index in vision["fullatt_block_indexes"]}) if gated else 0
    tower = Tower(
        hidden=hidden,
        layers=depth,
        used_layers=depth,
        layer_weights=4 * hidden**2 + mlp,
        patch=patch,
        channels=channels,
        image=None,
        layer_parameters=4 * (hidden**2 + hidden) + mlp + (2 if gated else 1) * inner + hidden + 2 * norm,
        outer_parameters=hidden * channels * patch**2 * frames
        + (hidden * (1 + vision["num_position_embeddings"]) if deep else 0),
        layer_norms=0 if gated else 2,
        frames=frames,
        merge=merge,
        window=vision["window_size"] // merge // patch if gated else 1,
        windowed=windowed,
    )
    merged, width = hidden * merge**2, vision["hidden_size" if first else "out_hidden_size"]
    weights = merged * (merged + width)
    linear = weights + merged + width
    stacked = len(vision["deepstack_visual_indexes"]) if deep else 0
    return tower, Projector(
        weights=(1 + stacked) * weights,
        parameters=linear + norm + stacked * (linear + 2 * merged),
        normed=0 if gated else (1 + stacked) * merged,
    )


def _one(side: Any) -> int:
    """The side of a square that a config may give twice."""
    return int(side[0] if isinstance(side, (list, tuple)) else side)


_READERS: dict[str, Callable[[dict[str, Any]], tuple[Tower, Projector]]] = {
    "clip_vision_model": _clip,
    "siglip_vision_model": _clip,
    "qwen2_vl_vision": _qwen,
    "qwen2_5_vl_vision": _qwen,
    "qwen3_vl_vision": _qwen,
    "internvl_vision": _internvl,
    "smolvlm_vision": _idefics,
    "idefics3_vision": _idefics,
}
"""By the tower's ``model_type``."""
