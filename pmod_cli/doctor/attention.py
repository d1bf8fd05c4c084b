"""Which attention back end a p-MoD model gets here, and why: asked of transformers, not guessed."""

from __future__ import annotations

import os
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
    further = ["flash_attention_2"] if is_flash_attn_2_available() else []
    return {"implementation": chosen, "why": _why(chosen, further), "installed": further}


def _why(chosen: str, further: list[str]) -> str:
    if chosen == "sdpa":
        why = "transformers' choice for p-MoD models; PyTorch picks the kernel"
    else:
        why = "transformers' choice, as SDPA is not to be had here"
    if further:
        return f"{why}; flash-attn is installed, and used where attn_implementation={further[0]} is asked for"
    return f"{why}; flash-attn is not installed, or has no GPU here"


def driver() -> str | None:
    """The version of NVIDIA's driver, or None if there is none, or it does not answer within five seconds."""
    import subprocess

    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(told.split(os.linesep)), "").strip() or None
