"""LLaVA-NeXT with each of its decoders, as the hub's checkpoints have them, through ``pmod convert``."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText

from pmod_cli.cli import main
from pmod_cli.families import FAMILIES
from tests.common.tiny import IMAGE, dense_counterpart, prompt, tiny_config, tiny_model

DECODERS = {
    "vicuna": ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}),
    "mistral": (
        "mistral",
        {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "llama3": (
        "llama",
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
            "eos_token_id": [2, 3],
            "head_dim": 8,
        },
    ),
}
PICTURE = {
    "input_ids": torch.tensor([prompt(1, 8, tokens=25 + 10 * 6)]),  # base tile, 10 rows of 5 and a newline
    "pixel_values": torch.randn(1, 3, 3, 20, 20, generator=torch.Generator().manual_seed(0)),
    "image_sizes": torch.tensor([[40, 20]]),
}


def convert(*arguments):
    with pytest.raises(SystemExit) as done:
        main(["convert", *map(str, arguments)])
    return done.value.code


def save_dense(folder, decoder, **text):
    dense = dense_counterpart(tiny_model("llava_next", decoder, mod=None, **text))
    dense.save_pretrained(folder)
    return dense


@pytest.mark.parametrize("name", DECODERS)
def test_keeping_every_token_is_the_baseline(name, tmp_path):
    decoder, text = DECODERS[name]
    dense = save_dense(tmp_path / "dense", decoder, **text)
    every = ("--set", "mod.schedule=constant", "--set", "mod.ratio=1.0", "--set", "mod.first_layer=0")
    assert convert(tmp_path / "dense", tmp_path / "pmod", *every) == 0
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "pmod").eval()
    assert type(model.model.language_model.layers[0]).__name__.startswith("MoD")
    with torch.no_grad():
        assert torch.equal(model(**PICTURE).logits, dense(**PICTURE).logits)
    options = {
        "max_new_tokens": 5,
        "do_sample": False,
        "attention_mask": torch.ones_like(PICTURE["input_ids"]),
    }
    assert torch.equal(model.generate(**PICTURE, **options), dense.generate(**PICTURE, **options))


@pytest.mark.parametrize("name", DECODERS)
def test_the_papers_schedule_keeps_fewer(name, tmp_path):
    decoder, text = DECODERS[name]
    save_dense(tmp_path / "dense", decoder, **text)
    assert convert(tmp_path / "dense", tmp_path / "pmod") == 0
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "pmod").eval()
    with torch.no_grad():
        routing = model(**PICTURE, output_routing=True).routing
    vision = PICTURE["input_ids"] == IMAGE
    kept = [int((layer.kept & vision).sum()) for layer in routing if layer is not None]
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] == int(0.15 * 85)


def test_a_sliding_window_is_refused(tmp_path, capsys):
    save_dense(tmp_path / "dense", "mistral")
    config = tiny_config("llava_next", "mistral", mod=None).to_dict() | {"model_type": "llava_next"}
    config["text_config"]["sliding_window"] = 16
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config, default=str))
    assert convert(tmp_path / "dense", tmp_path / "pmod") == 2
    assert "sliding window of 16 tokens" in capsys.readouterr().err
    assert not (tmp_path / "pmod").exists()


@pytest.mark.parametrize("command", ["convert", "profile"])
def test_an_unsupported_architecture_names_the_supported(command, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "blip"}')
    with pytest.raises(SystemExit) as done:
        main([command, str(tmp_path), *([str(tmp_path / "out")] if command == "convert" else [])])
    assert done.value.code == 2
    error, known = capsys.readouterr().err.splitlines(), ", ".join(family.name for family in FAMILIES)
    assert error[-1].endswith(f"'blip' is not supported (supported: {known})")
