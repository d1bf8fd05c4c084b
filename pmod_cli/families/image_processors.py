"""Image processors of models that come from the paper's release or from the original LLaVA format.

The release resizes with PIL. transformers takes its torchvision back end whatever class a checkpoint names, which
differs by up to three grey levels: enough to change which tokens a router keeps. These classes have only the PIL
back end. An ordinary Hugging Face checkpoint names transformers' own classes and is not touched.
"""

from __future__ import annotations

from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil


class PmodLlavaImageProcessor(LlavaImageProcessorPil):
    """LLaVA-1.5's preprocessing; ``do_pad=True`` pads to a square with the mean colour, else it crops."""


class PmodLlavaNextImageProcessor(LlavaNextImageProcessorPil):
    """LLaVA-NeXT's preprocessing; ``image_grid_pinpoints`` are (height, width)."""
