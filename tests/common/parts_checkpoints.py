"""A language model, a vision tower and a projector as they lie on the hub, made of a tiny model of ours."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import save_file

from tests.common.tiny import tiny_model

PIECES = 350
SENTENCES = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "USER: What is in the image? ASSISTANT: a cat sits on the mat",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
]


def sentencepiece_model() -> bytes:
    """A small model of the kind Llama has."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_writer=model,
        vocab_size=PIECES,
        model_type="bpe",
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.getvalue()


def save_parts(folder: Path, pieces: bytes, *, legacy: bool = False) -> tuple[Any, Path, Path, Path]:
    """Write the three folders; Vicuna has ``tokenizer.model`` alone, tower and projector are pickled.

    Returns:
        The model that they are parts of, and the folders of language model, tower and projector.
    """
    model = tiny_model("llava", vocab_size=PIECES, mod=None)
    weights = model.state_dict()

    vicuna, clip, stage1 = folder / "vicuna", folder / "clip", folder / "stage1"
    for path in (vicuna, clip, stage1):
        path.mkdir()
    text = {name: value for name, value in weights.items() if "language_model" in name or "lm_head" in name}
    text = {name.replace("model.language_model.", "model."): value.clone() for name, value in text.items()}
    text["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)  # old checkpoints have it
    save_file(text, vicuna / "model.safetensors")
    config = model.config.text_config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    (vicuna / "config.json").write_text(json.dumps(config))
    (vicuna / "generation_config.json").write_text(json.dumps({"do_sample": True, "eos_token_id": 2}))
    (vicuna / "tokenizer.model").write_bytes(pieces)
    token = {"__type": "AddedToken", "lstrip": False, "normalized": False, "rstrip": False}
    (vicuna / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "LlamaTokenizer",
                "add_bos_token": True,
                "bos_token": {**token, "content": "<s>"},
                "eos_token": {**token, "content": "</s>"},
                "unk_token": {**token, "content": "<unk>"},
                "pad_token": None,
                "legacy": legacy,
                "model_max_length": 4096,
                "padding_side": "right",
                "sp_model_kwargs": {},
            }
        )
    )
    (vicuna / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<unk>"}))

    tower = {
        name.replace("model.vision_tower.", "vision_model."): value.clone()
        for name, value in weights.items()
        if "vision_tower" in name
    }
    tower |= {"text_model.embeddings.position_ids": torch.zeros(3), "logit_scale": torch.zeros(())}
    torch.save(tower, clip / "pytorch_model.bin")
    vision = model.config.vision_config.to_dict()
    (clip / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision}))

    names = {"linear_1": "0", "linear_2": "2"}
    projector = {
        f"model.mm_projector.{names[name.split('.')[2]]}.{name.rsplit('.', 1)[1]}": value.half()
        for name, value in weights.items()
        if "projector" in name
    }
    torch.save(projector, stage1 / "mm_projector.bin")
    return model, vicuna, clip, stage1
