"""The recorded reference cases (``tests/reference``) as tensors, and how their names map to ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pmod_cli.modeling.settings import MoDConfig

REFERENCE = Path(__file__).parents[1] / "reference"


def load_case(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and description of a recorded case."""
    return load_file(REFERENCE / f"{name}.safetensors"), json.loads((REFERENCE / f"{name}.json").read_text())


def norm_settings(name: str) -> dict[str, Any]:
    """Our settings for a released weight-norm string: without numbers, scale and bias are 1."""
    function, *numbers = name.split("_")
    scale, bias = (float(number) for number in numbers) if numbers else (1.0, 1.0)
    return {"weight_norm": function, "weight_scale": scale, "weight_bias": bias}


def released_to_ours(name: str) -> str:
    """Parameter name in a released checkpoint -> in ours."""
    name = name.replace(".decoder_layer.", ".").replace(".router.router.", ".router.")
    if name.startswith("model.vision_tower.vision_tower.vision_model."):
        return name.replace("model.vision_tower.vision_tower.vision_model.", "model.vision_tower.")
    if name.startswith("model.mm_projector."):
        return name.replace("mm_projector.0", "multi_modal_projector.linear_1").replace(
            "mm_projector.2", "multi_modal_projector.linear_2"
        )
    if name.startswith("model.") and name != "model.image_newline":
        return "model.language_model." + name.removeprefix("model.")
    return name


def reference_mod_config() -> MoDConfig:
    """The schedule of the recorded 32-layer model."""
    _, description = load_case("model_prefill_decode_b1")
    ratios = {int(layer): ratio for layer, ratio in description["ratios"].items()}
    return MoDConfig([ratios.get(layer) for layer in range(32)])


def reference_model(family: str = "llava", attention: str = "sdpa") -> Any:
    """The recorded model, its weights renamed, as one of our classes (fp32, evaluation mode)."""
    from transformers import CLIPVisionConfig, LlamaConfig

    from pmod_cli.families.llava import PmodLlavaConfig, PmodLlavaForConditionalGeneration
    from pmod_cli.families.llava_next import PmodLlavaNextConfig, PmodLlavaNextForConditionalGeneration

    released = json.loads((REFERENCE / "model_config.json").read_text())
    weights = {
        released_to_ours(name): tensor
        for name, tensor in load_file(REFERENCE / "model_weights.safetensors").items()
    }
    text = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=257,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=weights["model.vision_tower.encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=24,
        patch_size=4,
    )
    # transformers embeds ids before it writes the image features over them: one more row for the image token.
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], torch.zeros(1, 64)])
    shared: dict[str, Any] = {
        "text_config": text,
        "vision_config": vision,
        "image_token_index": 256,
        "vision_feature_layer": -2,
        "mod": reference_mod_config().to_dict(),
    }
    if family == "llava":
        weights.pop("model.image_newline")
        model: Any = PmodLlavaForConditionalGeneration(PmodLlavaConfig(image_seq_length=36, **shared))
    else:
        pinpoints = [[height, width] for width, height in released["image_grid_pinpoints"]]
        model = PmodLlavaNextForConditionalGeneration(
            PmodLlavaNextConfig(image_grid_pinpoints=pinpoints, **shared)
        )
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    assert all("position_ids" in name or "inv_freq" in name for name in missing), missing
    model.set_attn_implementation(attention)
    return model.eval()
