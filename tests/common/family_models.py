"""Tiny random models of today's families, made with transformers' own classes, and their processors.

Four decoder layers of width 48; tokens are bytes and the families' own marks; the chat templates are the hub's,
without tools, thinking and numbers of pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

MARKS = ("<pad>", "<|im_start|>", "<|im_end|>", "<unk>")
TEXT: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 4096,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TOWER: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "patch_size": 4}
PLAIN_TOWER = {**TOWER, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16}
QWEN_TOWER = {**TOWER, "num_heads": 2, "in_channels": 3, "spatial_merge_size": 2, "temporal_patch_size": 2}
ROPE = {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 10000.0}

_TURN = (
    "{{ '<|im_start|>' + m['role'] + '\\n' }}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE{% elif c['type'] == 'video' %}VIDEO{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{{ '<|im_end|>\\n' }}"
)
_CHATML = (
    "{% for m in messages %}SYSTEM" + _TURN + "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_SYSTEM = (
    "{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
)
_SMOL = (
    "{{ '<|im_start|>' }}{% for m in messages %}{{ m['role'] | capitalize }}"
    "{% if m['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}"
    "{% elif c['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}{{ '<end_of_utterance>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def chatml(image: str, video: str, system: bool) -> str:
    template = _CHATML.replace("SYSTEM", _SYSTEM if system else "")
    return template.replace("IMAGE", image).replace("VIDEO", video)


QWEN_TEMPLATE = ("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>")


def tokenizer(marks: tuple[str, ...], eos: str = "<|im_end|>", **named: str) -> PreTrainedTokenizerFast:
    """Every byte is a token, and so is every mark."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*MARKS, *marks, *alphabet])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(mark, special=True) for mark in (*MARKS, *marks)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", eos_token=eos, extra_special_tokens=named
    )


def _model(name: str, tokens: PreTrainedTokenizerFast, **config: Any) -> Any:
    config["text_config"] = {**config["text_config"], "vocab_size": len(tokens)}
    made = getattr(transformers, f"{name}Config")(**config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForConditionalGeneration")(made)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)  # large enough for logits that differ
    model.generation_config.eos_token_id = tokens.eos_token_id
    model.generation_config.pad_token_id = tokens.pad_token_id
    return model.eval()


def _qwen(name: str, vision: dict[str, Any], text: dict[str, Any], system: bool) -> tuple[Any, Any]:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokens = tokenizer(("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"))
    ids = dict(zip(("start", "end", "image", "video"), range(len(MARKS), len(MARKS) + 4), strict=True))
    sizes: dict[str, Any] = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    sizes["size"] = {"shortest_edge": 64, "longest_edge": 64 * 16}
    processor = getattr(transformers, f"{name}Processor")(
        Qwen2VLImageProcessorPil(**sizes),
        tokens,
        getattr(transformers, "Qwen3VLVideoProcessor" if name == "Qwen3VL" else "Qwen2VLVideoProcessor")(
            **sizes
        ),
        chat_template=chatml(*QWEN_TEMPLATE, system),
    )
    model = _model(
        name,
        tokens,
        text_config={**TEXT, "rope_parameters": ROPE, **text},
        vision_config={**QWEN_TOWER, **vision},
        image_token_id=ids["image"],
        video_token_id=ids["video"],
        vision_start_token_id=ids["start"],
        vision_end_token_id=ids["end"],
    )
    return model, processor


def qwen2_vl() -> tuple[Any, Any]:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 48, "mlp_ratio": 2}
    return _qwen("Qwen2VL", vision, {}, system=True)


def qwen2_5_vl() -> tuple[Any, Any]:
    vision = {"depth": 2, "out_hidden_size": 48, "window_size": 16, "fullatt_block_indexes": [1]}
    return _qwen("Qwen2_5_VL", vision, {}, system=True)


def qwen3_vl() -> tuple[Any, Any]:
    vision = {
        "depth": 3,
        "out_hidden_size": 48,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    text = {
        "head_dim": 16,
        "rope_parameters": {**ROPE, "mrope_section": [4, 2, 2], "mrope_interleaved": True},
    }
    return _qwen("Qwen3VL", vision, text, system=False)


def internvl() -> tuple[Any, Any]:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    marks = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
    }
    tokens = tokenizer((*marks.values(), "<video>"), **marks, video_token="<video>")
    square = {"height": 16, "width": 16}
    processor = transformers.InternVLProcessor(
        GotOcr2ImageProcessorPil(size=square, crop_to_patches=False, min_patches=1, max_patches=4),
        tokens,
        transformers.InternVLVideoProcessor(size=square),
        image_seq_length=4,
        chat_template=chatml("{{ '<IMG_CONTEXT>\\n' }}", "{{ '<video>\\n' }}", system=False),
    )
    model = _model(
        "InternVL",
        tokens,
        text_config={**TEXT, "model_type": "qwen2"},
        vision_config={**PLAIN_TOWER, "image_size": [16, 16], "patch_size": [4, 4]},
        image_token_id=tokens.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    return model, processor


def _idefics(name: str) -> tuple[Any, Any]:
    import importlib

    module = importlib.import_module(
        f"transformers.models.{name.lower()}.image_processing_pil_{name.lower()}"
    )
    rows = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
    marks = ("<fake_token_around_image>", "<global-img>", "<image>", "<end_of_utterance>", *rows)
    tokens = tokenizer(marks, eos="<end_of_utterance>", image_token="<image>")
    edges: dict[str, Any] = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
    parts: list[Any] = [getattr(module, f"{name}ImageProcessorPil")(**edges), tokens]
    if name == "SmolVLM":
        parts.append(transformers.SmolVLMVideoProcessor(**edges))
    processor = getattr(transformers, f"{name}Processor")(*parts, image_seq_len=4, chat_template=_SMOL)
    model = _model(
        name,
        tokens,
        text_config={**TEXT, "model_type": "llama"},
        vision_config=PLAIN_TOWER,
        image_token_id=tokens.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    return model, processor


def smolvlm() -> tuple[Any, Any]:
    pytest.importorskip("num2words")  # its processor's
    return _idefics("SmolVLM")


def idefics3() -> tuple[Any, Any]:
    return _idefics("Idefics3")


MAKERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "internvl": internvl,
    "smolvlm": smolvlm,
    "idefics3": idefics3,
}


def pmod_of(dense: Any, ratios: list[float | None], router_scale: float = 0.3) -> Any:
    """The p-MoD counterpart of a dense model with the same weights; routers are random, or zero for scale 0."""
    from transformers.models.auto import CONFIG_MAPPING, AutoModelForImageTextToText

    import pmod_cli  # noqa: F401
    from pmod_cli.modeling.settings import MoDConfig

    data = {**dense.config.to_dict(), "model_type": f"pmod_{dense.config.model_type}"}
    config = CONFIG_MAPPING[data["model_type"]].from_dict({**data, "mod": MoDConfig(ratios).to_dict()})
    model = AutoModelForImageTextToText.from_config(config).eval()
    missing, unexpected = model.load_state_dict(dense.state_dict(), strict=False)
    assert not unexpected
    assert all(".router." in name for name in missing)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".router." in name:
            parameter.data.normal_(std=router_scale, generator=generator)
    model.generation_config = dense.generation_config
    return model
