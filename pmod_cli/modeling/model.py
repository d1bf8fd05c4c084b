"""What turns a transformers image-text-to-text class into its p-MoD counterpart.

A family (``pmod_cli/families``) mixes these in before its transformers classes: `MoDConfigMixin` into the
config, `MoDMultimodalModel` into the inner model (vision tower, projector, language model), and wraps the outer
model's ``forward`` with `with_routing`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache
from transformers.utils.generic import can_return_tuple

from pmod_cli.modeling.cache import adopt_cache
from pmod_cli.modeling.compat import CACHE_ARGUMENT, multimodal_output
from pmod_cli.modeling.decoders import take_over, to_mod
from pmod_cli.modeling.masks import causal_mask
from pmod_cli.modeling.plan import LayerRouting, RoutingPlan, count_tokens
from pmod_cli.modeling.settings import MoDConfig


class MoDConfigMixin:
    """Mixed into a family's config, which declares the field ``mod: dict | None = None``."""

    @property
    def mod_config(self) -> MoDConfig:
        """The ``mod`` section; without one every layer is dense.

        Raises:
            ValueError: If the section has an unknown key or a bad value.
        """
        section: dict[str, Any] | None = self.mod  # type: ignore[attr-defined]
        if section is None:
            return MoDConfig([None] * self.text_config.num_hidden_layers)  # type: ignore[attr-defined]
        return MoDConfig.from_dict(section)


class MoDMultimodalModel:
    """Mixed in before a family's inner model (e.g. `LlavaModel`).

    Attributes:
        output_class: The inner model's output (e.g. `LlavaModelOutputWithPast`).
        tiled: Whether each image is a base tile and a grid of high-resolution tiles.
        placeholders: By kind of vision input, where the config has the id of the token that stands for it. Inputs of
            other kinds than images are encoded by the family, which passes them on as ``mm_encoder_outputs``.
        image_arguments: Arguments of ``forward`` that `get_image_features` has and other families' has not.
    """

    output_class: type
    placeholders: ClassVar[dict[str, str]] = {"image": "image_token_id"}
    image_arguments: tuple[str, ...] = ()
    tiled = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.mod = config.mod_config
        self.language_model = to_mod(self.language_model, self.mod)  # type: ignore[has-type]
        self.post_init()  # type: ignore[attr-defined]

    @classmethod
    def from_dense(cls, dense: nn.Module) -> Any:
        """The p-MoD counterpart of a family's dense inner model, which is taken over, not copied."""
        model = take_over(dense, lambda: cls(dense.config))
        model.language_model = to_mod(dense.language_model, model.mod)
        return model

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        vision_mask: Tensor | None = None,
        routing_record: dict[int, LayerRouting] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Encode the images, find the vision tokens, and run the decoder with its routing plan.

        Args:
            input_ids: Prompt with expanded image tokens, [batch, tokens].
            pixel_values: See the family's image processor.
            image_sizes: (height, width) of each image, [images, 2], where the family wants them.
            attention_mask: 1 for real tokens, [batch, past + tokens]; None if nothing is padded.
            position_ids: [1 or batch, tokens].
            cache: A `DynamicCache`.
            past_key_values: Its name before transformers 5.24.
            inputs_embeds: [batch, tokens, hidden], in place of ``input_ids``.
            use_cache: Whether to fill a cache.
            mm_encoder_outputs: ``{"image": ...}``: what is already encoded, by kind.
            vision_feature_layer: Layer of the tower; the config's by default.
            vision_feature_select_strategy: The config's by default.
            vision_mask: True for vision tokens, [batch, tokens]; needed only with ``inputs_embeds`` into which
                the image features are already written.
            routing_record: Filled with each Mixture-of-Depths layer's `LayerRouting`.
            **kwargs: Passed on to the language model.

        Raises:
            ValueError: Neither or both of ``input_ids`` and ``inputs_embeds``; vision tokens and features of a
                kind that differ in number; an attention mask that is not 2-D; several sequences packed into one; a
                cache that cannot hold kept tokens; parts of images where ``vision_hr`` needs whole ones.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if attention_mask is not None and (
            not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2
        ):
            raise ValueError("a p-MoD model takes a 2-D attention mask (1 for real tokens)")
        cache = cache if cache is not None else past_key_values

        encoded = dict(mm_encoder_outputs or {})
        options = {
            "image_sizes": image_sizes,
            "vision_feature_layer": vision_feature_layer,
            "vision_feature_select_strategy": vision_feature_select_strategy,
            **{name: kwargs.pop(name, None) for name in self.image_arguments},
        }
        if encoded.get("image") is None and pixel_values is not None and pixel_values.shape[0]:
            encoded["image"] = self.get_image_features(  # type: ignore[attr-defined]
                pixel_values,
                return_dict=True,
                **{name: value for name, value in options.items() if value is not None},
            )
        encoded = {kind: output for kind, output in encoded.items() if output is not None}
        if "image" in encoded and self.mod.target_tokens == "vision_hr":
            _check_whole_images(encoded["image"])
        features = {kind: list(output.pooler_output) for kind, output in encoded.items()}
        if vision_mask is None or len(features) > 1:
            masks = {kind: self._placeholder_mask(kind, input_ids, inputs_embeds) for kind in features}
            vision_mask = functools.reduce(torch.logical_or, masks.values()) if masks else None
        else:
            masks = dict.fromkeys(features, vision_mask)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)  # type: ignore[attr-defined]
        plan, attention_mask = self._plan(
            vision_mask, attention_mask, position_ids, features, masks, inputs_embeds, routing_record
        )
        for kind, values in features.items():
            flat = torch.cat(values, dim=0).to(inputs_embeds.device, inputs_embeds.dtype)
            inputs_embeds = inputs_embeds.masked_scatter(masks[kind][..., None], flat)

        text_config = self.language_model.config
        use_cache = text_config.use_cache if use_cache is None else use_cache
        checkpointing = self.training and getattr(self.language_model, "gradient_checkpointing", False)  # type: ignore[attr-defined]
        if use_cache and cache is None and not checkpointing:
            cache = DynamicCache(config=text_config)
        if cache is not None:
            adopt_cache(cache, self.mod.mod_layers, text_config.num_hidden_layers)
        if attention_mask is not None:
            past = attention_mask.shape[1] - inputs_embeds.shape[1]
            attention_mask = causal_mask(text_config, inputs_embeds, past, attention_mask.bool())
        if not features:
            inputs_embeds = self._with_image_gradient(inputs_embeds)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            routing_plan=plan,
            **{CACHE_ARGUMENT: cache},
            **kwargs,
        )
        return multimodal_output(self.output_class, outputs, encoded)

    def _with_image_gradient(self, inputs_embeds: Tensor) -> Tensor:
        """In training without images, a zero gradient for the parts that images go through.

        Sharded training waits for every parameter's gradient, and another process may have images.
        """
        if not (self.training and torch.is_grad_enabled()):  # type: ignore[attr-defined]
            return inputs_embeds
        decoder = {id(parameter) for parameter in self.language_model.parameters()}
        trained = [p for p in self.parameters() if p.requires_grad and id(p) not in decoder]  # type: ignore[attr-defined]
        for parameter in trained:
            inputs_embeds = inputs_embeds + (0.0 * parameter.sum()).to(inputs_embeds.dtype)
        return inputs_embeds

    def _placeholder_mask(self, kind: str, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """True where a feature of this kind goes, [batch, tokens]."""
        token = getattr(self.config, self.placeholders[kind])  # type: ignore[attr-defined]
        if input_ids is not None:
            return input_ids == token
        assert inputs_embeds is not None
        marker = self.get_input_embeddings()(torch.tensor(token, device=inputs_embeds.device))  # type: ignore[attr-defined]
        return (inputs_embeds == marker).all(-1)

    def _plan(
        self,
        vision_mask: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        features: dict[str, list[Tensor]],
        masks: dict[str, Tensor],
        inputs_embeds: Tensor,
        record: dict[int, LayerRouting] | None,
    ) -> tuple[RoutingPlan | None, Tensor | None]:
        """The routing plan, and the attention mask, None if it hides nothing. One host synchronisation."""
        batch, length = inputs_embeds.shape[:2]
        real_mask = None if attention_mask is None else attention_mask[:, -length:].bool()
        whole_mask = None if attention_mask is None else attention_mask.bool()
        restarts = _restarts(position_ids, attention_mask, batch)
        vision, real, whole, packed, *by_kind = count_tokens(
            vision_mask, real_mask, whole_mask, restarts, *masks.values()
        )
        numbers = dict(zip(masks, by_kind, strict=True))
        if whole_mask is not None and whole == [whole_mask.shape[1]] * batch:
            attention_mask = real_mask = None
        num_real = real if real_mask is not None else [length] * batch
        for kind, values in features.items():
            found, expected = sum(numbers[kind]), sum(len(value) for value in values)
            if found != expected:
                raise ValueError(f"{found} {kind} tokens in the prompt for {expected} {kind} features")
        if vision_mask is None or not any(vision):
            return (None if real_mask is None else RoutingPlan(None, real_mask)), attention_mask
        if any(packed):
            raise ValueError(
                "position_ids start anew within a sequence: several sequences packed into one are not supported, "
                "since a layer keeps a share of each sequence's vision tokens; pad them into a batch"
            )
        targets, counts = vision_mask, vision
        if self.mod.target_tokens == "all":
            # A sample without vision tokens stays dense, as it is alone.
            targets = vision_mask.any(-1, keepdim=True).expand_as(vision_mask)
            targets = targets if real_mask is None else targets & real_mask
            counts = [length if seen else 0 for length, seen in zip(num_real, vision, strict=True)]
        elif self.mod.target_tokens == "vision_hr" and "image" in features:
            lengths = [len(feature) for feature in features["image"]]
            fine, fine_counts = self._high_resolution(masks["image"], numbers["image"], lengths)
            # Of what is no image, all tokens are routed.
            targets = fine | (vision_mask & ~masks["image"])
            counts = [
                total - images + kept
                for total, images, kept in zip(vision, numbers["image"], fine_counts, strict=True)
            ]
        ratios = self.language_model.retention_ratios
        return RoutingPlan.from_counts(targets, real_mask, counts, num_real, ratios, record), attention_mask

    def _high_resolution(
        self, vision_mask: Tensor, num_vision: list[int], lengths: list[int]
    ) -> tuple[Tensor, list[int]]:
        """Vision tokens behind each image's base tile; of an image that is one tile and no more, all.

        A tiled image can be so flat that no high-resolution token is left, and then none of its tokens is routed; a
        tile and a newline, with no row of others, is one tile in any family.
        """
        vision = self.config.vision_config  # type: ignore[attr-defined]
        base = (vision.image_size // vision.patch_size) ** 2
        single = (base + 1,) if self.tiled else (base, base + 1)
        flags = [index >= base or length in single for length in lengths for index in range(length)]
        counts, start = [], 0
        for number in num_vision:
            counts.append(sum(flags[start : start + number]))
            start += number
        source = torch.tensor(flags, device=vision_mask.device)
        return torch.zeros_like(vision_mask).masked_scatter(vision_mask, source), counts


def _restarts(position_ids: Tensor | None, attention_mask: Tensor | None, batch: int) -> Tensor | None:
    """True where positions fall within a sequence, [batch, tokens - 1], as in packed sequences.

    None with an attention mask, under which padding has positions of its own.
    """
    if position_ids is None or attention_mask is not None or position_ids.shape[-1] < 2:
        return None
    return (position_ids[..., 1:] < position_ids[..., :-1]).expand(batch, -1)


def _check_whole_images(image_outputs: Any) -> None:
    """``generate`` with ``prefill_chunk_size`` cuts encoded images, and leaves only their features."""
    if getattr(image_outputs, "last_hidden_state", None) is None:
        raise ValueError(
            "target tokens 'vision_hr' need to know where each image's base tile ends, which image features cut "
            "into chunks do not tell; leave prefill_chunk_size out"
        )


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


def with_routing(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Give an outer model's ``forward`` the option ``output_routing=True``.

    The output then has ``routing``: one entry a decoder layer, None for a dense layer and for a pass without
    routed tokens, else its `LayerRouting`. The signature that transformers inspects stays the dense model's.
    """

    @functools.wraps(forward)
    def routed(self: Any, *args: Any, output_routing: bool = False, **kwargs: Any) -> Any:
        if not output_routing:
            return forward(self, *args, **kwargs)
        record: dict[int, LayerRouting] = {}
        outputs = forward(self, *args, routing_record=record, **kwargs)
        layers = self.config.text_config.num_hidden_layers
        routing = tuple(record.get(index) for index in range(layers))
        if isinstance(outputs, tuple):
            return (*outputs, routing)
        outputs["routing"] = routing
        return outputs

    return routed
