"""Which attention back end a p-MoD model gets here, and why: asked of transformers, not guessed."""

from __future__ import annotations

from typing import Any

_TINY: dict[str, Any] = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 1,
    "num_hidden_layers": 1,
}


def attention() -> dict[str, Any]:
    """The attention back end of a p-MoD model for which none is asked.

    Returns:
        ``implementation`` as transformers names it, ``why``, and ``installed``: others that can be asked for.
    """
    import torch
    from transformers.utils import is_flash_attn_2_available

    from pmod_cli.families.llava import PmodLlavaConfig, PmodLlavaForConditionalGeneration

    config = PmodLlavaConfig(
        text_config={"model_type": "llama", "vocab_size": 8, "num_key_value_heads": 1, **_TINY},
        vision_config={"model_type": "clip_vision_model", "image_size": 8, "patch_size": 8, **_TINY},
    )
    with torch.device("meta"):
        model: Any = PmodLlavaForConditionalGeneration(config)
    chosen = model.config.text_config._attn_implementation
    flash = is_flash_attn_2_available()
    why = "transformers' choice for p-MoD models; PyTorch picks the kernel"
    if chosen != "sdpa":
        why = "transformers' choice, as SDPA is not available here"
    why += (
        "; flash-attn is installed, and used if you ask for attn_implementation=flash_attention_2"
        if flash
        else "; flash-attn is not installed, or has no GPU here"
    )
    return {"implementation": chosen, "why": why, "installed": ["flash_attention_2"] if flash else []}
