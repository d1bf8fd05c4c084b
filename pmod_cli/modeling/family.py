"""A family's p-MoD classes, made of its transformers classes: names, and nothing about any family."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationMixin,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.utils import ModelOutput

from pmod_cli.modeling.model import (
    MoDConfigMixin,
    MoDForConditionalGeneration,
    MoDMultimodalModel,
    with_routing,
)


class FamilyClasses(NamedTuple):
    """What `family_classes` makes.

    Attributes:
        config: E.g. `PmodLlavaConfig`, with ``model_type`` ``pmod_llava``.
        inner: E.g. `PmodLlavaModel`.
        outer: E.g. `PmodLlavaForConditionalGeneration`.
        output: What the outer model returns with ``output_routing``, e.g. `PmodLlavaCausalLMOutputWithPast`.
    """

    config: Any
    inner: Any
    outer: Any
    output: Any

    def register(self, processor: type | None, image_processor: type | None = None) -> None:
        """Let transformers' Auto classes know the family.

        transformers renames old parameter names while loading (``language_model.model.*``, ``vision_model.*``) by
        rules that it keeps by model type and by class name; ours are the dense family's.

        Args:
            processor: The processor class; None if its files alone name it.
            image_processor: An image processor of the family's own, found by name, for either back end.
        """
        AutoConfig.register(self.config.model_type, self.config, exist_ok=True)
        AutoModel.register(self.config, self.inner, exist_ok=True)
        AutoModelForImageTextToText.register(self.config, self.outer, exist_ok=True)
        if processor is not None:
            AutoProcessor.register(self.config, processor, exist_ok=True)
        if image_processor is not None:
            classes = dict.fromkeys(("pil", "torchvision"), image_processor)
            AutoImageProcessor.register(self.config, image_processor_classes=classes, exist_ok=True)
        names = [(_dense(self.config).model_type, self.config.model_type)]
        names += [(_dense(cls).__name__, cls.__name__) for cls in (self.inner, self.outer)]
        for dense_name, name in names:
            mapping = get_checkpoint_conversion_mapping(dense_name)
            if mapping is not None:
                register_checkpoint_conversion_mapping(name, mapping, overwrite=True)


def family_classes(
    module: str,
    config: Any,
    inner: type,
    outer: Any,
    decoders: Sequence[Any],
    vision: type[MoDMultimodalModel] = MoDMultimodalModel,
) -> FamilyClasses:
    """The p-MoD counterparts of a family's classes, each a subclass called ``Pmod`` and the dense class's name.

    Bind them to those names in the module, where pickle and readers look for them.

    Args:
        module: Name of that module; pass ``__name__``.
        config: E.g. `LlavaConfig`, or a subclass with settings of our own.
        inner: E.g. `LlavaModel`: its ``forward`` calls the language model with keyword arguments and hands on those
            that it does not know.
        outer: E.g. `LlavaForConditionalGeneration`.
        decoders: The p-MoD language models that it can have (`mod_decoder`).
        vision: What is special about the inner model.
    """

    def make(bases: tuple[type, ...], dense: type, doc: str, **attributes: Any) -> Any:
        attributes |= {"__module__": module, "__doc__": f"`{dense.__name__}` {doc}"}
        return type(f"Pmod{dense.__name__}", bases, attributes)

    doc = "whose decoder has Mixture-of-Depths layers."
    model_type = f"pmod_{config.model_type}"
    mod_config = make(
        (MoDConfigMixin, config), _dense(config), "with a ``mod`` section.", model_type=model_type
    )
    mod_inner = make((vision, inner), _dense(inner), doc, config_class=mod_config, decoders=tuple(decoders))
    dense_output = _output_class(outer)
    fields = [("routing", "tuple[LayerRouting | None, ...] | None", None)]
    name = f"Pmod{outer.__name__.removesuffix('ForConditionalGeneration')}CausalLMOutputWithPast"
    output = dataclasses.make_dataclass(name, fields, bases=(dense_output,))
    output.__module__ = module
    mod_outer = make(
        # transformers looks for its mixin among a class's direct bases to tell whether it generates.
        (MoDForConditionalGeneration, outer, GenerationMixin),
        outer,
        doc,
        config_class=mod_config,
        inner_class=mod_inner,
        forward=with_routing(outer.forward, output),
    )
    return FamilyClasses(mod_config, mod_inner, mod_outer, output)


def _output_class(outer: Any) -> Any:
    """The class of what an outer model's ``forward`` returns, by its annotation."""
    returned = typing.get_type_hints(inspect.unwrap(outer.forward)).get("return")
    for cls in typing.get_args(returned) or (returned,):
        if inspect.isclass(cls) and issubclass(cls, ModelOutput):
            return cls
    raise TypeError(f"{outer.__name__}.forward does not say which output class it returns")


def _dense(cls: type) -> Any:
    """The transformers class that a p-MoD class extends."""
    return next(base for base in cls.__mro__ if base.__module__.startswith("transformers."))
