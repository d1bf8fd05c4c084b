"""The p-MoD classes of a family that is not listed, made by looking at its transformers classes (``convert --any``)."""

from __future__ import annotations

from typing import Any

from transformers import AutoModel, AutoModelForImageTextToText
from transformers.models.auto import CONFIG_MAPPING, PROCESSOR_MAPPING

from pmod_cli.modeling.family import FamilyClasses, family_classes

_made: dict[str, FamilyClasses] = {}


def classes_of(model_type: str) -> FamilyClasses:
    """The classes for a dense ``model_type``, registered with transformers; its decoder is whatever a config names.

    Raises:
        KeyError: transformers has no image-text-to-text model of that type with an inner model.
    """
    if model_type not in _made:
        config: Any = CONFIG_MAPPING[model_type]
        models = (AutoModel, AutoModelForImageTextToText)
        inner, outer = (auto._model_mapping[config] for auto in models)
        made = family_classes(__name__, config, inner, outer, decoders=())
        globals().update({cls.__name__: cls for cls in made})  # where pickle looks for them
        made.register(PROCESSOR_MAPPING.get(config, None))
        _made[model_type] = made
    return _made[model_type]
