"""LLaVA-OneVision: a base tile and tiles for an image, one tile for each of several images, pooled frames for a video.

Its decoder is Qwen2, its vision tower SigLIP. The tokens of videos are vision tokens and routed like an image's.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionModel,
    LlavaOnevisionProcessor,
)
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModelOutputWithPast

from pmod_cli.modeling.model import (
    MoDConfigMixin,
    MoDForConditionalGeneration,
    MoDMultimodalModel,
    with_routing,
)
from pmod_cli.modeling.registration import register_classes


class PmodLlavaOnevisionConfig(MoDConfigMixin, LlavaOnevisionConfig):
    """`LlavaOnevisionConfig` with a ``mod`` section (see `MoDConfig`)."""

    model_type = "pmod_llava_onevision"
    mod: dict[str, Any] | None = None


class PmodLlavaOnevisionModel(MoDMultimodalModel, LlavaOnevisionModel):
    """`LlavaOnevisionModel` whose decoder has Mixture-of-Depths layers."""

    config_class = PmodLlavaOnevisionConfig
    output_class = LlavaOnevisionModelOutputWithPast
    tiled = True
    placeholders: ClassVar[dict[str, str]] = {"image": "image_token_id", "video": "video_token_id"}
    image_arguments = ("vision_aspect_ratio", "batch_num_images")

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        image_sizes_videos: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Encode videos, then go on as with images (see `MoDMultimodalModel.forward`).

        Args:
            input_ids: Prompt with expanded image and video tokens, [batch, tokens].
            pixel_values: [images, tiles, 3, height, width].
            pixel_values_videos: [videos, frames, 3, height, width].
            image_sizes_videos: Not used, as in transformers.
            mm_encoder_outputs: ``{"image": ..., "video": ...}``: what is already encoded.
            **kwargs: See there; also ``batch_num_images`` and ``vision_aspect_ratio``.
        """
        encoded = dict(mm_encoder_outputs or {})
        if encoded.get("video") is None and pixel_values_videos is not None:
            names = ("vision_feature_layer", "vision_feature_select_strategy")
            options = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
            encoded["video"] = self.get_video_features(pixel_values_videos, return_dict=True, **options)
            self._end_videos(encoded["video"], frames=pixel_values_videos.shape[1])
        return super().forward(input_ids, pixel_values, mm_encoder_outputs=encoded, **kwargs)

    def _end_videos(self, outputs: Any, frames: int) -> None:
        """Put the newline behind each video where transformers has not; 5.17 does it in its own ``forward``."""
        config: Any = self.config
        side = math.ceil(config.vision_config.image_size // config.vision_config.patch_size / 2)
        features = outputs.pooler_output
        if features.shape[1] == frames * side**2:
            newline = self.image_newline.to(features).expand(len(features), 1, -1)
            outputs.pooler_output = torch.cat((features, newline), dim=1)


class PmodLlavaOnevisionForConditionalGeneration(
    MoDForConditionalGeneration, LlavaOnevisionForConditionalGeneration
):
    """`LlavaOnevisionForConditionalGeneration` whose decoder has Mixture-of-Depths layers."""

    config_class = PmodLlavaOnevisionConfig
    inner_class = PmodLlavaOnevisionModel
    forward = with_routing(LlavaOnevisionForConditionalGeneration.forward)


def register() -> None:
    """Register with transformers."""
    register_classes(
        PmodLlavaOnevisionConfig,
        PmodLlavaOnevisionModel,
        PmodLlavaOnevisionForConditionalGeneration,
        LlavaOnevisionProcessor,
    )
