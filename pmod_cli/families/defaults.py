"""transformers' defaults for what a ``config.json`` leaves out, so that counting usual models need not import it.

Configs on the hub leave out what is a default of their class. A test holds these tables equal to transformers' own;
for every other type transformers is asked.
"""

from __future__ import annotations

from typing import Any

from pmod_cli.output.errors import PmodError

_CLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
}
CLIP_LARGE_336 = _CLIP | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "image_size": 336,
    "patch_size": 14,
}
_LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "vocab_size": 32000,
    "head_dim": None,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
_LLAVA = {
    "image_token_index": 32000,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "multimodal_projector_bias": True,
    "tie_word_embeddings": False,
}
_GRIDS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]

MODELS: dict[str, dict[str, Any]] = {"llava": _LLAVA, "llava_next": _LLAVA | {"image_grid_pinpoints": _GRIDS}}
"""By ``model_type`` of the whole model; both have Llama and CLIP inside unless they say otherwise."""

PARTS: dict[str, dict[str, Any]] = {
    "clip_vision_model": _CLIP,
    "llama": _LLAMA,
    "mistral": _LLAMA | {"intermediate_size": 14336, "num_key_value_heads": 8},
    "qwen2": _LLAMA | {"intermediate_size": 22016, "num_key_value_heads": 32, "vocab_size": 151936},
}
"""By ``model_type`` of the language model or vision tower."""

_LARGEST = dict.fromkeys(
    ("hidden_size", "intermediate_size", "num_attention_heads", "num_channels", "image_size", "patch_size"),
    10**6,
) | {"num_hidden_layers": 1000, "vocab_size": 10**8}
_PAIRS = ("image_size", "patch_size")
_OPTIONAL = {"num_key_value_heads": 10**6, "head_dim": 10**6}


def check_config(raw: dict[str, Any]) -> None:
    """Refuse a ``config.json`` of a model that cannot be: a size that is no number, below 1 or beyond all reason.

    What it leaves out, or sets to None, is not looked at. An attention that is code of the hub's, which transformers
    would download and run, is refused too.
    """
    _check_attention(raw)
    parts = (("", raw), ("text_config", raw.get("text_config")), ("vision_config", raw.get("vision_config")))
    defaults = {"text_config": "llama", "vision_config": "clip_vision_model"}
    for where, part in parts:
        if not isinstance(part or {}, dict):
            raise PmodError(f"config.json: {where} is no object")
        kind = (part or {}).get("model_type")
        kind = defaults.get(where, "") if kind is None else kind
        if not isinstance(kind, str):
            raise PmodError(f"config.json: model_type is {kind!r}, not a name")
        of = f" of {kind}" if kind else ""
        for key, largest in (_LARGEST | _OPTIONAL).items():
            size = (part or {}).get(key)
            # Some towers take pictures of (height, width).
            sizes = size if key in _PAIRS and isinstance(size, list) and len(size) == 2 else [size]
            if size is not None and any(type(each) is not int or not 1 <= each <= largest for each in sizes):
                raise PmodError(f"config.json: {key}{of} is {size!r}, not a number from 1 to {largest}")
        layers = (part or {}).get("vision_feature_layer", 0)
        chosen = layers if isinstance(layers, list) else [0 if layers is None else layers]
        if any(type(each) is not int or abs(each) > 1000 for each in chosen):
            raise PmodError(f"config.json: vision_feature_layer is {layers!r:.40}, not the number of a layer")
        dropout = (part or {}).get("attention_dropout", 0)
        if dropout is not None and not (isinstance(dropout, int | float) and 0 <= dropout < 1):
            raise PmodError(f"config.json: attention_dropout{of} is {dropout!r}, not a share below 1")


def _check_attention(value: Any, name: str = "") -> None:
    """Look at each key of a config, of its parts too; an attention may be given for each part by name."""
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else (("", each) for each in value):
            _check_attention(each, name or (key if "attn_implementation" in str(key) else ""))
    elif name and isinstance(value, str) and "/" in value:
        raise PmodError(f"config.json: {name} is {value!r:.80}, code from the hub, which pmod does not run")


def complete(raw: dict[str, Any]) -> dict[str, Any]:
    """A dense ``config.json`` with its defaults filled in; `PmodError` as `check_config` says."""
    check_config(raw)
    text = {"model_type": "llama"} | (raw.get("text_config") or {})
    vision = {"model_type": "clip_vision_model"} | (raw.get("vision_config") or CLIP_LARGE_336)
    kinds = (text["model_type"], vision["model_type"])
    if raw["model_type"] not in MODELS or not set(kinds) <= set(PARTS):
        full: dict[str, Any] = transformers_config(raw).to_dict()
        return full
    for part, kind in zip((text, vision), kinds, strict=True):
        part |= {key: value for key, value in PARTS[kind].items() if key not in part}
        for key in _LARGEST:
            if part.get(key, 1) is None:
                raise PmodError(f"config.json: {key} of {kind} is None, not a number above 0")
    given = {key: value for key, value in raw.items() if value is not None}
    if "image_token_id" in given:
        given.setdefault("image_token_index", given["image_token_id"])
    return {**MODELS[raw["model_type"]], **given, "text_config": text, "vision_config": vision}


def transformers_config(raw: dict[str, Any]) -> Any:
    """The transformers config of a ``config.json``; `PmodError` if transformers refuses it."""
    from transformers.models.auto import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    except Exception as error:  # of many kinds, those of huggingface_hub's strict dataclasses among them
        reason = " ".join(str(error).split())
        raise PmodError(f"transformers refuses the config of {raw['model_type']}: {reason}") from error
