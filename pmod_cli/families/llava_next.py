"""LLaVA-NeXT (1.6): a base tile and a grid of high-resolution tiles for each image (anyres)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    LlavaModel,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextModel,
    LlavaNextProcessor,
)
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from pmod_cli.families.anyres import high_resolution_size, shrunk_size, unpadded_box
from pmod_cli.families.image_processors import PmodLlavaNextImageProcessor
from pmod_cli.families.tiles import TiledVision
from pmod_cli.modeling.decoders import PmodLlamaModel, PmodMistralModel, PmodQwen2Model
from pmod_cli.modeling.family import family_classes


class AnyresConfig(LlavaNextConfig):
    """`LlavaNextConfig` with the release's way of unpadding.

    Attributes:
        released_anyres: Unpad feature maps as the paper's release does (see `families.anyres`). Written by
            conversion from the released and the original LLaVA format; False is transformers' behaviour.
        max_num_patches: With ``released_anyres``: shrink feature maps of more than so many tiles.
    """

    released_anyres: bool = False
    max_num_patches: int | None = None


class PmodLlavaNextProcessor(LlavaNextProcessor):
    """`LlavaNextProcessor` that counts image tokens as `PmodLlavaNextModel` makes them (see `AnyresConfig`)."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        num_additional_image_tokens: int = 0,
        released_anyres: bool = False,
        max_num_patches: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.released_anyres, self.max_num_patches = released_anyres, max_num_patches
        super().__init__(
            image_processor,
            tokenizer,
            patch_size,
            vision_feature_select_strategy,
            chat_template,
            image_token,
            num_additional_image_tokens,
            **kwargs,
        )

    def _get_unpadded_features(self, *sizes: int) -> tuple[int, int]:
        if not self.released_anyres:
            unpadded: tuple[int, int] = super()._get_unpadded_features(*sizes)
            return unpadded
        height, width, side, _, down, across = sizes
        rows, columns = high_resolution_size((height, width), (down, across), side, self.max_num_patches)
        return rows * columns, rows


class AnyresVision(TiledVision):
    """What `LlavaNextModel` does not do: single tiles without sizes, and the release's way of unpadding."""

    @functools.wraps(LlavaNextModel.get_image_features)
    def get_image_features(
        self, pixel_values: Tensor, image_sizes: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """As in transformers; [images, 3, height, width] without sizes are one tile per image, as in LLaVA-1.5."""
        if image_sizes is None and pixel_values.dim() == 4:
            return LlavaModel.get_image_features(self, pixel_values, **kwargs)
        return super().get_image_features(pixel_values, image_sizes=image_sizes, **kwargs)  # type: ignore[misc]

    def pack_image_features(
        self,
        image_features: Any,
        image_sizes: Any,
        vision_feature_select_strategy: str,
        image_newline: Tensor | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """Base tile, then the rows of the unpadded high-resolution map, each with a newline.

        Args:
            image_features: [tiles, features of a tile, hidden] for each image, base tile first.
            image_sizes: (height, width) of each image.
            vision_feature_select_strategy: Not used where the release's rule applies.
            image_newline: [hidden].

        Returns:
            [vision tokens, hidden] for each image, and the numbers of vision tokens.
        """
        config: Any = self.config  # type: ignore[attr-defined]
        if not config.released_anyres or image_newline is None:
            return super().pack_image_features(  # type: ignore[misc]
                image_features, image_sizes, vision_feature_select_strategy, image_newline
            )
        tile = config.vision_config.image_size
        side = tile // config.vision_config.patch_size
        packed = []
        for tiles, size in zip(image_features, torch.as_tensor(image_sizes).tolist(), strict=True):
            down, across = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, tile)
            grid = tiles[1:].view(down, across, side, side, -1).permute(4, 0, 2, 1, 3)
            features = grid.flatten(1, 2).flatten(2, 3)
            top, bottom, left, right = unpadded_box(size, (down * side, across * side))
            features = features[:, top:bottom, left:right]
            shrunk = shrunk_size((bottom - top, right - left), side, config.max_num_patches)
            if shrunk != (bottom - top, right - left):
                features = F.interpolate(features[None], shrunk, mode="bilinear")[0]
            newlines = image_newline.to(features)[:, None, None].expand(-1, features.shape[1], 1)
            rows = torch.cat((features, newlines), dim=2).flatten(1, 2).transpose(0, 1)
            packed.append(torch.cat((tiles[0], rows)))
        return packed, torch.tensor([len(tokens) for tokens in packed], device=packed[0].device)


CLASSES = family_classes(
    __name__,
    AnyresConfig,
    LlavaNextModel,
    LlavaNextForConditionalGeneration,
    decoders=(PmodLlamaModel, PmodMistralModel, PmodQwen2Model),
    vision=AnyresVision,
)
(
    PmodLlavaNextConfig,
    PmodLlavaNextModel,
    PmodLlavaNextForConditionalGeneration,
    PmodLlavaNextCausalLMOutputWithPast,
) = CLASSES
CLASSES.register(PmodLlavaNextProcessor, PmodLlavaNextImageProcessor)
