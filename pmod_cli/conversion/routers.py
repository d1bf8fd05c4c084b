"""The schedule of a conversion and its routers: zeros, so that training starts where the baseline stands."""

from __future__ import annotations

from typing import Any

from pmod_cli.checkpoints.shards import StoredTensor
from pmod_cli.conversion.decoder import DecoderLayout
from pmod_cli.families import Family
from pmod_cli.modeling.settings import MoDConfig
from pmod_cli.output.errors import PmodError
from pmod_cli.recipe import Recipe


def check_recipe(recipe: Recipe, family: Family) -> None:
    """Refuse a recipe that is meant for another family.

    Raises:
        PmodError: It is.
    """
    if recipe.family not in (None, family.name):
        raise PmodError(
            f"recipe {recipe.name} is for {recipe.family} and the source is {family.name}",
            "choose a recipe of its family, or --set family=null if you mean it",
        )


def check_decoder(family: Family, config: dict[str, Any]) -> None:
    """Refuse a language model that cannot become p-MoD.

    Raises:
        PmodError: Its architecture is not supported, or its attention has a sliding window.
    """
    text = config.get("text_config") or {}
    kind = text.get("model_type", family.decoders[0])
    if kind not in family.decoders:
        raise PmodError(
            f"language model {kind!r} is not supported in {family.name}",
            f"supported: {', '.join(family.decoders)}",
        )
    # What transformers takes where the config is silent.
    window = text.get("sliding_window", 4096 if kind == "mistral" else None)
    if window and text.get("use_sliding_window", kind == "mistral"):
        raise PmodError(
            f"the language model's attention has a sliding window of {window} tokens, which is not supported",
            "a window counts tokens, and p-MoD layers drop some; sliding_window: null in config.json ends it",
        )


def schedule(recipe: Recipe, layers: int) -> MoDConfig:
    """The Mixture-of-Depths settings of a recipe for a decoder of so many layers.

    Raises:
        PmodError: The schedule does not fit, gives a ratio outside (0, 1], or leaves every layer dense.
    """
    settings = recipe.mod
    ratios = settings.retention_ratios(layers)
    for layer, ratio in enumerate(ratios):
        if ratio is not None and not 0 < ratio <= 1:
            raise PmodError(
                f"recipe {recipe.name}: the retention ratio of layer {layer} is {ratio:g}, outside (0, 1]",
                "raise mod.floor or lower mod.ceiling",
            )
    if all(ratio is None for ratio in ratios):
        raise PmodError(f"recipe {recipe.name} leaves all {layers} decoder layers dense")
    return MoDConfig(
        ratios,
        weight_norm=settings.weight_norm,
        weight_scale=settings.weight_scale,
        weight_bias=settings.weight_bias,
        router_bias=settings.router_bias,
        target_tokens=settings.target_tokens,
    )


def router_tensors(
    mod: MoDConfig, layout: DecoderLayout, given: dict[int, dict[str, StoredTensor]]
) -> list[StoredTensor]:
    """The routers of every Mixture-of-Depths layer: those given, or zeros in the decoder's dtype.

    Args:
        mod: Which layers, and whether routers have a bias.
        layout: Names, width and dtype.
        given: Tensors that the source has, by layer; all of them, or none.

    Raises:
        PmodError: A router is missing or has the wrong shape.
    """
    shapes = {"weight": (1, layout.hidden)} | ({"bias": (1,)} if mod.router_bias else {})
    tensors = []
    for layer in mod.mod_layers:
        for part, shape in shapes.items():
            name = layout.router_name(layer, part)
            if not given:
                tensors.append(StoredTensor.zeros(name, layout.dtype, shape))
                continue
            tensor = given.get(layer, {}).get(part)
            if tensor is None or tensor.shape != shape:
                what = (
                    "is missing" if tensor is None else f"has shape {list(tensor.shape)}, not {list(shape)}"
                )
                raise PmodError(f"the {part} of layer {layer}'s router {what} in the source")
            tensors.append(tensor.renamed(name))
    return tensors
