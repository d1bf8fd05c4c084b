"""What turns a transformers image-text-to-text class into its p-MoD counterpart, whatever its family.

`pmod_cli.modeling.family` mixes these in before a family's classes: the config gets a ``mod`` section; the inner
model (vision tower, projector, language model) tells the language model which tokens are vision; the outer one has the
option ``output_routing`` and takes ``vision_mask`` in ``generate``. The forward passes are transformers' own.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pmod_cli.modeling.attention import avoid_plans
from pmod_cli.modeling.compat import PIXELS, encoded_inputs
from pmod_cli.modeling.decoders import pre_norm_decoder, take_over
from pmod_cli.modeling.plan import RoutingRecord
from pmod_cli.modeling.router import GOLDEN_STEP, grid_step
from pmod_cli.modeling.settings import MoDConfig

logger = logging.getLogger(__name__)


@dataclass(eq=False, repr=False, kw_only=True)
class MoDConfigMixin:
    """Mixed into a family's config.

    Attributes:
        mod: What `MoDConfig.to_dict` gives; None for a model whose layers are all dense.
    """

    mod: dict[str, Any] | None = None

    @property
    def mod_config(self) -> MoDConfig:
        """The ``mod`` section; without one every layer is dense.

        Raises:
            ValueError: If the section has an unknown key or a bad value.
        """
        if self.mod is None:
            # A family's config, into which this is mixed, has it.
            return MoDConfig([None] * self.text_config.num_hidden_layers)  # type: ignore[attr-defined]
        return MoDConfig.from_dict(self.mod)


class MoDMultimodalModel:
    """Mixed in before a family's inner model (e.g. `LlavaModel`).

    Attributes:
        decoders: The p-MoD language models that it can have; empty for whatever it has, if its layers are pre-norm.
    """

    decoders: Sequence[Any]

    def __init__(self, config: Any) -> None:
        # The class that this is mixed into has both.
        super().__init__(config)  # type: ignore[call-arg]
        self.mod: MoDConfig = config.mod_config
        self._route(self)
        self.post_init()  # type: ignore[attr-defined]

    @classmethod
    def from_dense(cls, dense: nn.Module) -> Any:
        """The p-MoD counterpart of a family's dense inner model, which is taken over, not copied."""
        model = take_over(dense, lambda: cls(dense.config))
        model._route(dense)
        return model

    def _route(self, dense: Any) -> None:
        """Put the p-MoD counterpart of the dense model's language model in its place, whatever its name is.

        Raises:
            ValueError: If the family has no such language model.
        """
        language_model = dense.get_decoder()
        kind: str = language_model.config.model_type
        known: dict[str, Any] = {cls.config_class.model_type: cls for cls in self.decoders}
        if not self.decoders:
            known[kind] = pre_norm_decoder(language_model)
        if kind not in known:
            raise ValueError(f"language model {kind!r} is not supported; supported: {', '.join(known)}")
        decoder = known[kind].from_dense(language_model, self.mod)
        width = self._tokens_across(dense.config)
        decoder.token_step = GOLDEN_STEP if width is None else grid_step(width)
        # Both want the transformers model that this is mixed into.
        self.set_decoder(decoder)  # type: ignore[attr-defined]
        avoid_plans(self)  # type: ignore[arg-type]

    @staticmethod
    def _tokens_across(config: Any) -> int | None:
        """Vision tokens in a row, in a family whose every picture is one square of them; else None."""
        return None

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers; what gets ``sdpa`` gets it without plans per shape (`pmod_cli.modeling.attention`)."""
        super().set_attn_implementation(*args, **kwargs)  # type: ignore[misc]
        avoid_plans(self)  # type: ignore[arg-type]

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        vision_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        """The family's own forward, which hands its unknown arguments to the language model: `MoDDecoder` plans there.

        transformers checks that placeholders and features are as many, and waits for the device twice for each kind of
        vision input (the comparison, and its message, which is written in any case). That is all before the decoder;
        the plan adds one wait.

        Args:
            input_ids: Prompt with expanded image tokens, [batch, tokens].
            attention_mask: 1 for real tokens, [batch, past + tokens]; None if nothing is padded.
            inputs_embeds: [batch, tokens, hidden], in place of ``input_ids``.
            vision_mask: True for vision tokens, [batch, tokens]. Needed only with ``inputs_embeds`` into which the
                image features are already written; else the placeholders are found as transformers does.
            **inputs: See the family's class; also ``routing_record`` (`RoutingRecord`).

        Raises:
            ValueError: An attention mask that is not 2-D; a ``vision_mask`` of other tokens; what transformers and
                the plan refuse.
        """
        if attention_mask is not None and getattr(attention_mask, "ndim", 0) != 2:
            raise ValueError("a p-MoD model takes a 2-D attention mask (1 for real tokens)")
        if not self._kinds(inputs):
            inputs["vision_gradient"] = self._vision_gradient()
        if vision_mask is None:
            vision_mask = self.vision_tokens(input_ids, inputs_embeds, inputs)
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if vision_mask is not None and tokens is not None and vision_mask.shape != tokens.shape[:2]:
            raise ValueError(f"vision_mask is {list(vision_mask.shape)} for tokens {list(tokens.shape[:2])}")
        forward = super().forward  # type: ignore[misc]
        inputs |= {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        if inputs.get("mm_encoder_outputs") is None:
            return forward(vision_mask=vision_mask, **inputs)
        with encoded_inputs(self, forward, inputs):  # type: ignore[arg-type]
            return forward(vision_mask=vision_mask, **inputs)

    def vision_tokens(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, inputs: dict[str, Any]
    ) -> Tensor | None:
        """True for vision tokens, [batch, tokens]; None if the forward pass brings no images.

        A placeholder without an image, which the model may have generated, is text. A family may refine this.

        Args:
            input_ids: See `forward`.
            inputs_embeds: See `forward`.
            inputs: Other arguments of `forward`; what is encoded on the way may be written into them.
        """
        masks = [self.placeholders(kind, input_ids, inputs_embeds) for kind in self._kinds(inputs)]
        return functools.reduce(torch.logical_or, masks) if masks else None

    def placeholders(self, kind: str, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """True where a feature of this kind (``image``, ``video``) goes, [batch, tokens], as transformers finds it."""
        token = getattr(self.config, f"{kind}_token_id")  # type: ignore[attr-defined]
        if inputs_embeds is None:
            assert input_ids is not None
            return input_ids == token
        embedded = self.get_input_embeddings()(torch.tensor(token, device=inputs_embeds.device))  # type: ignore[attr-defined]
        return (inputs_embeds == embedded).all(-1)

    def _kinds(self, inputs: dict[str, Any]) -> list[str]:
        """Kinds of vision input that a forward pass brings, as pixels or encoded; pixels of no picture are left out."""
        encoded = inputs.get("mm_encoder_outputs") or {}
        for pixels in PIXELS.values():
            if inputs.get(pixels) is not None and not len(inputs[pixels]):
                del inputs[pixels]
        return [k for k in PIXELS if inputs.get(PIXELS[k]) is not None or encoded.get(k) is not None]

    def _vision_gradient(self) -> Tensor | None:
        """In training without images, a zero that gives a zero gradient to the parts that images go through.

        Sharded training waits for every parameter's gradient, and another process may have images.
        """
        if not (self.training and torch.is_grad_enabled()):  # type: ignore[attr-defined]
            return None
        decoder = {id(parameter) for parameter in self.get_decoder().parameters()}  # type: ignore[attr-defined]
        trained = [p for p in self.parameters() if p.requires_grad and id(p) not in decoder]  # type: ignore[attr-defined]
        return sum((0.0 * parameter.sum() for parameter in trained), torch.zeros(())) if trained else None


class MoDForConditionalGeneration:
    """Mixed in before a family's outer model (e.g. `LlavaForConditionalGeneration`).

    Attributes:
        inner_class: The family's `MoDMultimodalModel`.
    """

    inner_class: type[MoDMultimodalModel]

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.model = self.inner_class.from_dense(self.model)  # type: ignore[has-type]
        self.post_init()  # type: ignore[attr-defined]

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """See `MoDMultimodalModel.set_attn_implementation`."""
        super().set_attn_implementation(*args, **kwargs)  # type: ignore[misc]
        avoid_plans(self.model)

    @staticmethod
    def create_masks_for_generate(
        config: Any, inputs_embeds: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Tensor | None:
        """For a static cache: the prompt's own 2-D mask; a decode step has none, since the cache knows what is used.

        transformers would make a 4-D mask here, of the dense layers' size.
        """
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        return None if cache is not None and cache.is_initialized else attention_mask

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool = False,
        vision_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in transformers; the prompt's ``vision_mask``, [batch, tokens], goes where pictures go: to the prefill."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, *args, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        merged = inputs_embeds is not None and vision_mask is None and not self.model._kinds(dict(kwargs))
        if is_first_iteration and merged:
            logger.warning(
                "inputs_embeds without pictures and vision_mask: all tokens are taken for text, and kept"
            )
        if vision_mask is not None and (is_first_iteration or not kwargs.get("use_cache", True)):
            new = 0 if is_first_iteration else input_ids.shape[1] - vision_mask.shape[1]
            embeds = inputs.get("inputs_embeds")
            length = (inputs["input_ids"] if embeds is None else embeds).shape[1]
            inputs["vision_mask"] = F.pad(vision_mask, (0, new))[:, -length:]
        return inputs


def with_routing(forward: Callable[..., Any], output_class: type) -> Callable[..., Any]:
    """Give an outer model's ``forward`` the option ``output_routing=True``.

    The output then has ``routing``: one entry per decoder layer, None for a dense layer and for a pass without
    routed tokens, else its `LayerRouting`. The signature that transformers inspects stays the dense model's.

    Args:
        forward: The dense model's method.
        output_class: Its output's class with the field ``routing``.
    """

    @functools.wraps(forward)
    def routed(self: Any, *args: Any, output_routing: bool = False, **kwargs: Any) -> Any:
        if not output_routing:
            return forward(self, *args, **kwargs)
        record = RoutingRecord()
        outputs = forward(self, *args, routing_record=record, **kwargs)
        routing = tuple(map(record.get, range(self.config.text_config.num_hidden_layers)))
        return (*outputs, routing) if isinstance(outputs, tuple) else output_class(**outputs, routing=routing)

    return routed
