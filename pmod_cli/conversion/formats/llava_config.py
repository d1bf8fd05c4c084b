"""Settings of the original LLaVA code and of the p-MoD release, in transformers' terms: model, schedule, processor."""

from __future__ import annotations

import ast
import math
import re
from pathlib import Path
from typing import Any

from pmod_cli.modeling.schedule import Ratios, constant, interleaved
from pmod_cli.modeling.settings import WEIGHT_NORMS, MoDConfig
from pmod_cli.output.errors import PmodError
from pmod_cli.output.files import to_json

_DECODER_FIELDS = [
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias", "attention_dropout",
    "hidden_act", "mlp_bias", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "rope_theta", "rope_scaling", "rope_parameters",
    "sliding_window", "use_sliding_window", "max_window_layers", "layer_types",
    "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache",
]  # fmt: skip
_TOWER_FIELDS = [
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels",
    "image_size", "patch_size", "hidden_act", "layer_norm_eps", "attention_dropout",
    "initializer_range", "initializer_factor", "projection_dim",
]  # fmt: skip
_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
_BICUBIC = 3

_TARGETS = {"vision_all": "vision", "vision_hr": "vision_hr", "all": "all"}
_DECAY = re.compile(r"(\w+)_decay_(\d+\.\d+)_(\d+\.\d+)")
_RELEASED_STEPS = 31  # the release divides by this, layers - 1 of its 32, whatever the model has

NEXT_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""Tiles (across, down) of the released LLaVA-NeXT runs, in their order, which decides ties."""


def decoder_config(config: dict[str, Any], model_type: str) -> dict[str, Any]:
    """The decoder's part of a flat LLaVA config, or of a language model's own."""
    return {"model_type": model_type} | {name: config[name] for name in _DECODER_FIELDS if name in config}


def tower_config(config: dict[str, Any], name: str) -> dict[str, Any]:
    """The vision half of the config of a ``clip`` or ``clip_vision_model`` checkpoint, which messages call ``name``."""
    kind = config.get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise PmodError(f"vision tower {name} is of type {kind!r}: only CLIP towers are supported here")
    vision = {**config, **(config.get("vision_config") or config.get("vision_config_dict") or {})}
    missing = [key for key in ("hidden_size", "image_size", "patch_size") if key not in vision]
    if missing:
        raise PmodError(f"the config of vision tower {name} has no {', '.join(missing)}")
    return {"model_type": "clip_vision_model"} | {key: vision[key] for key in _TOWER_FIELDS if key in vision}


def family_name(config: dict[str, Any]) -> str:
    """``llava`` or ``llava_next``, by what the code of this format does with an image; else a `PmodError`."""
    projector = config.get("mm_projector_type", "mlp2x_gelu")
    if projector != "mlp2x_gelu":
        raise PmodError(f"mm_projector_type {projector!r} is not supported", "supported: mlp2x_gelu")
    if config.get("mm_use_im_start_end"):
        raise PmodError("mm_use_im_start_end is not supported", "transformers puts no tokens around an image")
    if config.get("mm_vision_select_feature", "patch") not in ("patch", "cls_patch"):
        raise PmodError(f"mm_vision_select_feature {config['mm_vision_select_feature']!r} is not supported")
    if not str(config.get("image_aspect_ratio", "")).startswith("anyres"):
        return "llava"
    merge = config.get("mm_patch_merge_type", "flat")
    if merge != "spatial_unpad":
        raise PmodError(f"mm_patch_merge_type {merge!r} is not supported with anyres", "spatial_unpad is")
    return "llava_next"


def dense_config(
    config: dict[str, Any], model_type: str, vision: dict[str, Any], image_token: int, rows: int
) -> dict[str, Any]:
    """The transformers config of a LLaVA checkpoint in the original or the released format.

    Of its flat config, the ``model_type`` of its decoder, what `tower_config` gave, the id of the image token, and the
    rows of the embedding table, with the image token's.
    """
    strategy = "default" if config.get("mm_vision_select_feature", "patch") == "patch" else "full"
    family = family_name(config)
    dense = {
        "model_type": family,
        "architectures": [
            "LlavaNextForConditionalGeneration" if family == "llava_next" else "LlavaForConditionalGeneration"
        ],
        "text_config": decoder_config(config, model_type) | {"vocab_size": rows},
        "vision_config": vision,
        "image_token_index": image_token,
        "image_seq_length": (vision["image_size"] // vision["patch_size"]) ** 2 + (strategy == "full"),
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": strategy,
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
    }
    dtype = config.get("dtype", config.get("torch_dtype"))
    if dtype:
        dense["dtype"] = dtype
    if family == "llava_next":
        dense |= {
            "image_grid_pinpoints": grid_pinpoints(config),
            "released_anyres": True,
            "max_num_patches": max_num_patches(config),
        }
    return dense


def grid_pinpoints(config: dict[str, Any]) -> list[list[int]]:
    """``image_grid_pinpoints``, (height, width) as in transformers, where this format has (width, height).

    Their order stays, since it decides between two grids that are equally good.
    """
    pinpoints: Any = config.get("image_grid_pinpoints")
    try:
        pairs = ast.literal_eval(pinpoints) if isinstance(pinpoints, str) else pinpoints
        return [[int(height), int(width)] for width, height in pairs]
    except (TypeError, ValueError, SyntaxError):
        raise PmodError(f"image_grid_pinpoints {pinpoints!r} are no list of (width, height)") from None


def max_num_patches(config: dict[str, Any]) -> int | None:
    """N of ``image_aspect_ratio: anyres_max_N``: larger feature maps are shrunk to about N tiles."""
    match = re.fullmatch(r"anyres_max_(\d+)", str(config.get("image_aspect_ratio", "")))
    return int(match[1]) if match else None


def mod_config(config: dict[str, Any]) -> MoDConfig:
    """The schedule, weight normalisation and targets of a released p-MoD config; `PmodError` for unknown ones."""
    target = config.get("mod_target_token_type", "vision_all")
    if target not in _TARGETS:
        raise PmodError(f"mod_target_token_type {target!r} is not known", f"known: {', '.join(_TARGETS)}")
    norm, scale, bias = weight_norm(str(config.get("mod_weight_norm")))
    try:
        return MoDConfig(
            released_ratios(config),
            weight_norm=norm,
            weight_scale=scale,
            weight_bias=bias,
            router_bias=bool(config.get("mod_bias_enabled", True)),
            target_tokens=_TARGETS[target],
        )
    except ValueError as error:
        raise PmodError(f"the schedule of the released config is not usable: {error}") from error


def weight_norm(name: str) -> tuple[str, float, float]:
    """Function, scale and bias of a ``mod_weight_norm``: ``tanh_0.2_1``; without numbers both are 1."""
    function, *numbers = name.split("_")
    try:
        scale, bias = (float(number) for number in numbers) if numbers else (1.0, 1.0)
    except ValueError:
        function = ""
    if function not in WEIGHT_NORMS:
        raise PmodError(f"mod_weight_norm {name!r} is not known", "e.g. tanh_0.2_1, sigmoid, softmax, none")
    return function, scale, bias


def released_ratios(config: dict[str, Any]) -> Ratios:
    """The retention ratio of each layer, as the release computes it from a ``mod_target_layers`` name."""
    name = config.get("mod_target_layers")
    try:
        layers, factor = int(config["num_hidden_layers"]), float(config["mod_router_factor"])
    except (KeyError, TypeError, ValueError):
        raise PmodError("the released config has no num_hidden_layers or mod_router_factor") from None
    if name == "interleave":
        return interleaved(layers, ratio=factor)
    if name in ("deep_all", "deep_all_include_last"):
        return constant(layers, ratio=factor, last_layer=layers - 1 if name.endswith("last") else None)
    curves = {
        "shiftedcos": lambda layer: math.cos(layer * math.pi / _RELEASED_STEPS) / 2 + factor,
        "shiftedlinear": lambda layer: -layer / _RELEASED_STEPS + 0.5 + factor,
    }
    match = _DECAY.match(str(name))
    if not match or match[1] not in curves:
        raise PmodError(
            f"mod_target_layers {name!r} is not known",
            "known: shiftedcos_decay_A_B, shiftedlinear_decay_A_B, deep_all, deep_all_include_last, interleave",
        )
    ceiling, floor = float(match[2]), float(match[3])
    raw = [curves[match[1]](layer) for layer in range(layers)]
    return [None if ratio > ceiling else max(ratio, floor) for ratio in raw]


def processor_files(
    dense: dict[str, Any], tower: dict[str, Any] | None, aspect_ratio: str | None, *, baseline: bool = False
) -> dict[str, Path | bytes]:
    """``preprocessor_config.json`` and ``processor_config.json`` for a dense config and an ``image_aspect_ratio``.

    What the tower's own ``preprocessor_config.json`` says counts more than CLIP's settings. The dense ``baseline`` has
    to load without this package, and gets transformers' own classes.
    """
    vision, tiled = dense["vision_config"], dense["model_type"] == "llava_next"
    side = vision["image_size"]
    images: dict[str, Any] = {
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        **dict.fromkeys(
            ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"), True
        ),
        "resample": _BICUBIC,
        "rescale_factor": 1 / 255,
        "image_mean": _CLIP_MEAN,
        "image_std": _CLIP_STD,
    }
    images |= {name: value for name, value in (tower or {}).items() if name in images}
    images["do_pad"] = tiled or aspect_ratio == "pad"
    if tiled:
        images["image_grid_pinpoints"] = dense["image_grid_pinpoints"]
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
    return {"preprocessor_config.json": to_json(images), "processor_config.json": to_json(processor)}


def generation_file(*configs: dict[str, Any] | None) -> bytes:
    """``generation_config.json`` with the special tokens alone, from the first config that has them: it is greedy.

    Vicuna's own says ``do_sample: true``, which the original evaluation code overrides everywhere.
    """
    found: dict[str, Any] = {}
    for config in reversed(configs):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if config and config.get(name) is not None:
                found[name] = config[name]
    return to_json(found)
