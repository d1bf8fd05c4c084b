"""How pictures of any shape become the vision tower's squares, as LLaVA was trained."""

from __future__ import annotations

from typing import Any

from pmod_cli.output.errors import PmodError

MAX_TILES = 4
"""Sub-images of LLaVA-NeXT in the paper's runs, beside the overview."""


def apply_aspect(config: Any, processor: Any, aspect: str) -> Any:
    """Set the processor (and, for ``anyres``, the model's config) to an image aspect ratio.

    Args:
        config: The model's; changed in place.
        processor: Likewise.
        aspect: ``pad`` (LLaVA-1.5: pad to a square with the mean colour), ``anyres`` (LLaVA-NeXT, at most
            `MAX_TILES` sub-images) or ``processor`` (as the checkpoint has it).

    Returns:
        The processor, which saves these settings with the checkpoint.

    Raises:
        PmodError: The aspect ratio belongs to the other family.
    """
    tiled = hasattr(config, "image_grid_pinpoints")
    if aspect == "pad":
        if tiled:
            raise PmodError("train.image_aspect_ratio=pad is LLaVA-1.5's", "LLaVA-NeXT takes anyres")
        processor.image_processor = _padding(processor.image_processor)
    elif aspect == "anyres":
        if not tiled:
            raise PmodError("train.image_aspect_ratio=anyres is LLaVA-NeXT's", "LLaVA-1.5 takes pad")
        side = config.vision_config.image_size
        kept = [
            [height, width]
            for height, width in config.image_grid_pinpoints
            if (height // side) * (width // side) <= MAX_TILES
        ]
        if not kept:
            raise PmodError(f"no entry of image_grid_pinpoints has at most {MAX_TILES} sub-images")
        config.image_grid_pinpoints = kept
        processor.image_processor.image_grid_pinpoints = kept
    return processor


def _padding(image_processor: Any) -> Any:
    """LLaVA's own image processor with the settings of a CLIP one, which crops."""
    from pmod_cli.families.image_processors import PmodLlavaImageProcessor

    if isinstance(image_processor, PmodLlavaImageProcessor):
        image_processor.do_pad = True
        return image_processor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    settings = image_processor.to_dict()
    names = ("size", "crop_size", "image_mean", "image_std", "rescale_factor", "resample", "do_convert_rgb")
    return LlavaImageProcessorPil(
        **{name: settings[name] for name in names if settings.get(name) is not None},
        do_pad=True,
        do_resize=True,
        do_center_crop=True,
    )
