"""Images that are a base tile and a grid of high-resolution tiles, in LLaVA-NeXT and LLaVA-OneVision.

The target tokens ``vision_hr`` leave the base tile to every layer (p-MoD's release, for LLaVA-NeXT).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from pmod_cli.modeling.compat import PIXELS
from pmod_cli.modeling.model import MoDMultimodalModel


class TiledVision(MoDMultimodalModel):
    """An inner model whose base tile is the first ``(image_size // patch_size) ** 2`` features of an image."""

    def vision_tokens(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, inputs: dict[str, Any]
    ) -> Tensor | None:
        """For ``vision_hr``, vision tokens behind each image's base tile, and all of what is no image.

        Images are encoded here, since only their features tell how many each has.

        Raises:
            ValueError: If ``vision_hr`` gets parts of images.
        """
        vision = super().vision_tokens(input_ids, inputs_embeds, inputs)
        if vision is None or self.mod.target_tokens != "vision_hr":
            return vision
        output = self._encode(inputs).get("image")
        if output is None:
            return vision
        if getattr(output, "last_hidden_state", None) is None:
            # `generate` with prefill_chunk_size cuts encoded images, and leaves only their features.
            raise ValueError(
                "target tokens 'vision_hr' need to know where each image's base tile ends, which image features "
                "cut into chunks do not tell; leave prefill_chunk_size out"
            )
        image = self.placeholders("image", input_ids, inputs_embeds)
        flags = self._high_resolution([len(features) for features in output.pooler_output])
        flags += [False] * (image.numel() - len(flags))  # wrong numbers are transformers' to refuse
        fine = torch.zeros_like(image).masked_scatter(image, torch.tensor(flags, device=image.device))
        return fine | (vision & ~image)

    def _encode(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Encode what comes as pixels, with transformers' own methods; ``inputs`` then has it encoded."""
        encoded = dict(inputs.get("mm_encoder_outputs") or {})
        for kind, pixels in PIXELS.items():
            if inputs.get(pixels) is not None:
                encode = getattr(self, f"get_{kind}_features")
                names = inspect.signature(encode).parameters.keys() - PIXELS.values()
                options = {name: inputs[name] for name in names if inputs.get(name) is not None}
                encoded[kind] = encode(inputs.pop(pixels), **options, return_dict=True)
        inputs["mm_encoder_outputs"] = encoded
        return encoded

    def _high_resolution(self, lengths: list[int]) -> list[bool]:
        """For each feature of images of these lengths, whether it is one of the high-resolution tiles'.

        Of an image that is one tile and a newline, all are. A tiled image can be so flat that no such feature is left.
        """
        vision = self.config.vision_config  # type: ignore[attr-defined]
        base = (vision.image_size // vision.patch_size) ** 2
        return [index >= base or length == base + 1 for length in lengths for index in range(length)]
