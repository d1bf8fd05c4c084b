"""Checkpoints in the original LLaVA format and in the released p-MoD format, made of tiny models of ours.

The names and the config are those recorded in ``tests/reference``; they are spelled out here once more, the other way
round, so that a mistake in the code under test does not cancel out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.common.tiny import IMAGE

PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "crop_size": {"height": 20, "width": 20},
    "size": {"shortest_edge": 20},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.25, 0.26, 0.27],
    "resample": 3,
    "rescale_factor": 1 / 255,
}


def released_name(name: str, mod_layers: set[int]) -> str:
    """A parameter of our models as the release calls it."""
    if name.startswith("model.vision_tower."):
        return name.replace("model.vision_tower.", "model.vision_tower.vision_tower.vision_model.")
    if name.startswith("model.multi_modal_projector."):
        number = {"linear_1": "0", "linear_2": "2"}[name.split(".")[2]]
        return f"model.mm_projector.{number}.{name.rsplit('.', 1)[1]}"
    if name.startswith("model.language_model.layers."):
        layer, rest = name.removeprefix("model.language_model.layers.").split(".", 1)
        if rest.startswith("router."):
            return f"model.layers.{layer}.router.{rest}"
        middle = "decoder_layer." if int(layer) in mod_layers else ""
        return f"model.layers.{layer}.{middle}{rest}"
    return name.replace("model.language_model.", "model.")


def released_weights(model: Any) -> dict[str, Tensor]:
    """All weights of a tiny model in the release's names; the image token's row is not there."""
    layers = set(model.config.mod_config.mod_layers)
    weights = {released_name(name, layers): value.clone() for name, value in model.state_dict().items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:IMAGE].clone()
    return weights


def flat_config(model: Any, **changes: Any) -> dict[str, Any]:
    """The release's flat ``config.json`` of a tiny model."""
    text = model.config.text_config
    names = (
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
        "rms_norm_eps max_position_embeddings bos_token_id eos_token_id pad_token_id"
    )
    config = {name: getattr(text, name) for name in names.split()}
    tiled = "next" in model.config.model_type
    config |= {
        "model_type": "pmod_llava_llama",
        "architectures": ["PmodLlavaLlamaForCausalLM"],
        "vocab_size": IMAGE,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "mm_vision_tower": "tower",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "anyres" if tiled else "pad",
        "mm_patch_merge_type": "spatial_unpad" if tiled else "flat",
        "mod_target_token_type": "vision_all",
        "mod_bias_enabled": True,
        "mod_weight_norm": "tanh_0.2_1",
        "tokenizer_model_max_length": 400,
    }
    if tiled:
        config["image_grid_pinpoints"] = [[w, h] for h, w in model.config.image_grid_pinpoints]
    return config | changes


def save_checkpoint(
    folder: Path,
    config: dict[str, Any],
    weights: dict[str, Tensor],
    *,
    vision_config: Any,
    tower_inside: bool = True,
    shards: int = 1,
    pickled: bool = False,
) -> Path:
    """Write a checkpoint folder, its tower inside or in the folder ``tower``."""
    tower = folder / "tower"
    tower.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (tower / "config.json").write_text(json.dumps(vision_config.to_dict()))
    (tower / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    prefix = "model.vision_tower.vision_tower."
    if not tower_inside:
        of_tower = {name.removeprefix(prefix): weights.pop(name) for name in list(weights) if prefix in name}
        _save(tower, of_tower, 1, pickled)
    _save(folder, weights, shards, pickled)
    return folder


def save_original(folder: Path, model: Any, *, changes: dict[str, Any] | None = None, **layout: Any) -> Path:
    """Write a dense model in LLaVA's own format; ``layout`` goes to `save_checkpoint`."""
    kind = model.config.text_config.model_type
    model_type = {"llama": "llava_llama", "mistral": "llava_mistral", "qwen2": "llava_qwen"}[kind]
    config = flat_config(model, model_type=model_type, **(changes or {}))
    config = {key: value for key, value in config.items() if not key.startswith("mod_")}
    weights = released_weights(model)
    return save_checkpoint(folder, config, weights, vision_config=model.config.vision_config, **layout)


def _save(folder: Path, weights: dict[str, Tensor], shards: int, pickled: bool) -> None:
    stem, suffix = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    write: Any = torch.save if pickled else save_file
    if shards == 1:
        write(weights, folder / f"{stem}.{suffix}")
        return
    names = sorted(weights)
    index: dict[str, str] = {}
    for shard in range(shards):
        file = f"{stem}-{shard + 1:05d}-of-{shards:05d}.{suffix}"
        part = names[shard::shards]
        write({name: weights[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
