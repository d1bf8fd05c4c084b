"""Processor and generation settings of a checkpoint that comes from the original LLaVA code or the p-MoD release."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
_BICUBIC = 3
_IMAGE_SETTINGS = [
    "size",
    "crop_size",
    "do_resize",
    "do_center_crop",
    "do_rescale",
    "do_normalize",
    "do_convert_rgb",
    "resample",
    "rescale_factor",
    "image_mean",
    "image_std",
]
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def processor_files(
    dense: dict[str, Any], tower: dict[str, Any] | None, aspect_ratio: str | None, *, baseline: bool = False
) -> dict[str, Path | bytes]:
    """``preprocessor_config.json`` and ``processor_config.json``.

    Args:
        dense: The dense transformers config.
        tower: ``preprocessor_config.json`` of the vision tower; CLIP's settings if None.
        aspect_ratio: ``image_aspect_ratio`` of the source.
        baseline: For the dense baseline, which has to load without this package: transformers' own classes.
    """
    vision, tiled = dense["vision_config"], dense["model_type"] == "llava_next"
    side = vision["image_size"]
    images: dict[str, Any] = {
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "do_resize": True,
        "do_center_crop": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "resample": _BICUBIC,
        "rescale_factor": 1 / 255,
        "image_mean": _CLIP_MEAN,
        "image_std": _CLIP_STD,
    }
    images |= {name: value for name, value in (tower or {}).items() if name in _IMAGE_SETTINGS}
    if tiled:
        images |= {"do_pad": True, "image_grid_pinpoints": dense["image_grid_pinpoints"]}
    else:
        images["do_pad"] = aspect_ratio == "pad"
    prefix, stem = ("" if baseline else "Pmod"), ("LlavaNext" if tiled else "Llava")
    images["image_processor_type"] = f"{prefix}{stem}ImageProcessor"
    processor: dict[str, Any] = {
        "processor_class": f"{prefix if tiled else ''}{stem}Processor",
        "patch_size": vision["patch_size"],
        "vision_feature_select_strategy": dense["vision_feature_select_strategy"],
        # The class token of CLIP, which "default" drops again.
        "num_additional_image_tokens": 1,
        "image_token": "<image>",
    }
    if tiled and not baseline:
        processor |= {name: dense[name] for name in ("released_anyres", "max_num_patches")}
    images["processor_class"] = processor["processor_class"]
    return {"preprocessor_config.json": _json(images), "processor_config.json": _json(processor)}


def generation_file(*configs: dict[str, Any] | None) -> bytes:
    """``generation_config.json`` with the special tokens and nothing else, so that ``generate`` is greedy.

    Vicuna's own says ``do_sample: true``, which the original evaluation code overrides everywhere.

    Args:
        configs: Where to look for a token's id, the first that has it counts.
    """
    found = {
        name: next((config[name] for config in configs if config and config.get(name) is not None), None)
        for name in _IDS
    }
    return _json({name: value for name, value in found.items() if value is not None})


def _json(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()
