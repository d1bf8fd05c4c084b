"""How transformers gets to know a family: the Auto classes, and the older names of its parameters."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)


def register_classes(config: type, inner: type, outer: type, processor: type) -> None:
    """Register one family's p-MoD classes.

    transformers renames old parameter names while loading (``language_model.model.*``, ``vision_model.*``) by
    rules that it keeps by model type and by class name; ours are the dense family's.

    Args:
        config: The p-MoD config class.
        inner: The p-MoD inner model (`MoDMultimodalModel`).
        outer: The p-MoD outer model (`MoDForConditionalGeneration`).
        processor: The processor class.
    """
    model_type: str = config.model_type  # type: ignore[attr-defined]
    AutoConfig.register(model_type, config, exist_ok=True)
    AutoModel.register(config, inner, exist_ok=True)
    AutoModelForImageTextToText.register(config, outer, exist_ok=True)
    AutoProcessor.register(config, processor, exist_ok=True)
    names = [(_dense(config).model_type, model_type)]  # type: ignore[attr-defined]
    names += [(_dense(cls).__name__, cls.__name__) for cls in (inner, outer)]
    for dense_name, name in names:
        mapping = get_checkpoint_conversion_mapping(dense_name)
        if mapping is not None:
            register_checkpoint_conversion_mapping(name, mapping, overwrite=True)


def _dense(cls: type) -> type:
    """The transformers class that a p-MoD class extends."""
    return next(base for base in cls.__mro__ if base.__module__.startswith("transformers."))
