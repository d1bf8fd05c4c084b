"""``convert --any``: families that are not listed are proved on a tiny model, or refused with what differed."""

from __future__ import annotations

import importlib
import json
import random
from unittest import mock

import pytest
import transformers
from transformers import CLIPVisionConfig, LlamaConfig, LlamaModel

from pmod_cli.cli import main
from pmod_cli.conversion.proof import prove, tiny_config
from pmod_cli.evaluation.tasks import write_task
from pmod_cli.families import REFUSED, find_family
from pmod_cli.modeling import decoders
from pmod_cli.output.errors import PmodError
from tests.common import family_models
from tests.common.eval_models import make_processor, noise, write_questions
from tests.common.family_models import MAKERS, TEXT

TURNS = [{"from": "human", "value": "<image> w1"}, {"from": "gpt", "value": "w2"}]
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def run(*arguments):
    with pytest.raises(SystemExit) as done:
        main([str(argument) for argument in arguments])
    return done.value.code


def save(folder, name, **text):
    """A dense checkpoint of an unlisted family that is laid out as LLaVA."""
    processor = make_processor()
    config = getattr(transformers, f"{name}Config")(
        text_config={**TEXT, "model_type": "llama", "vocab_size": len(processor.tokenizer), **text},
        vision_config=CLIPVisionConfig(**SMALL, image_size=16, patch_size=4),
        image_token_id=processor.image_token_id,
    )
    config.vision_feature_layers = [-1, -2]
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", MAKERS)
def test_listed_families_pass_the_same_proof(name, tmp_path):
    dense, processor = MAKERS[name]()
    processor.save_pretrained(tmp_path)
    classes = importlib.import_module(f"pmod_cli.families.{name}").CLASSES
    found = prove(tmp_path, dense.config.to_dict(), classes)
    assert found["decoder"] == type(dense.get_decoder()).__name__
    assert found["layer"] == type(dense.get_decoder().layers[0]).__name__


def test_an_unlisted_family(tmp_path, capsys):
    dense = save(tmp_path / "dense", "VipLlava")
    assert run("convert", dense, tmp_path / "pmod") == 2
    assert "'vipllava' is not supported" in capsys.readouterr().err
    assert run("convert", dense, tmp_path / "pmod", "--any", "--json") == 0
    assert json.loads(capsys.readouterr().out)["result"]["family"] == "vipllava"
    config = json.loads((tmp_path / "pmod" / "config.json").read_text())
    assert config["pmod"]["any"]["layer"] == "LlamaDecoderLayer"
    assert config["architectures"] == ["PmodVipLlavaForConditionalGeneration"]
    picture = tmp_path / "a.png"
    noise(random.Random(0), 20, 20).save(picture)
    assert run("inspect", tmp_path / "pmod", "--json") == 0
    assert (
        run("generate", tmp_path / "pmod", "--image", picture, "--prompt", "Hi", "--max-new-tokens", 2) == 0
    )
    assert run("profile", tmp_path / "pmod") == 2
    assert "cannot count" in capsys.readouterr().err
    data = [{"id": n, "image": f"{n}.png", "conversations": TURNS} for n in range(24)]
    (tmp_path / "data.json").write_text(json.dumps(data))
    for n in range(24):
        noise(random.Random(n), 20, 20).save(tmp_path / f"{n}.png")
    given = ["--data", tmp_path / "data.json", "--images", tmp_path, "--samples", 24, "-o", tmp_path / "out"]
    assert run("calibrate", tmp_path / "pmod", *given) == 2
    assert "cannot count" in capsys.readouterr().err
    # The dense model is loaded too, to compare with.
    assert run("generate", dense, "--image", picture, "--prompt", "Hi", "--max-new-tokens", 2) == 0
    path = write_task(tmp_path / "task", "qa", write_questions(tmp_path / "questions", ["red"] * 3))
    asked = ["--tasks", "qa", "--include-path", path.parent, "--max-new-tokens", 2, "--json"]
    capsys.readouterr()
    assert run("eval", tmp_path / "pmod", "--baseline", dense, *asked) == 0
    assert json.loads(capsys.readouterr().out)["result"]["baseline"]
    assert run("convert", tmp_path / "pmod", tmp_path / "back", "--to", "baseline") == 0
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == (dense / name).read_bytes()


def test_what_differs_is_told(tmp_path, capsys):
    dense = save(tmp_path / "dense", "VipLlava", model_type="cohere")  # one norm for both branches
    assert run("convert", dense, tmp_path / "pmod", "--any") == 2
    error = capsys.readouterr().err
    assert "CohereDecoderLayer is no pre-norm layer" in error
    assert "post_attention_layernorm" in error
    assert not (tmp_path / "pmod").exists()


def test_a_proof_that_fails_is_told(tmp_path, monkeypatch):
    from pmod_cli.modeling.layer import MoDDecoderLayer

    dense, processor = MAKERS["internvl"]()
    processor.save_pretrained(tmp_path)
    routed = MoDDecoderLayer._routed
    monkeypatch.setattr(MoDDecoderLayer, "_routed", lambda *arguments: routed(*arguments) * 1.001)
    with pytest.raises(PmodError, match="a model that keeps every token differs from the dense one"):
        prove(tmp_path, dense.config.to_dict())


@pytest.mark.parametrize("model_type", REFUSED)
def test_families_that_do_not_fit_are_refused_by_name(model_type, tmp_path, capsys):
    for kind in (model_type, f"pmod_{model_type}"):
        with pytest.raises(PmodError, match="cannot become p-MoD"):
            find_family(kind, unlisted=True)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert run("convert", tmp_path, tmp_path / "out", "--any") == 2
    assert REFUSED[model_type] in capsys.readouterr().err


def test_the_proof_refuses_attention_both_ways():
    """What PaliGemma is refused for by name is found without its name, too."""
    from pmod_cli.modeling.family import family_classes

    classes = family_classes(
        __name__,
        transformers.PaliGemmaConfig,
        transformers.PaliGemmaModel,
        transformers.PaliGemmaForConditionalGeneration,
        decoders=(),
    )
    config = classes.config(
        text_config={**TEXT, "model_type": "gemma", "vocab_size": 300},
        vision_config={**SMALL, "model_type": "siglip_vision_model", "image_size": 16, "patch_size": 4},
        image_token_id=5,
        projection_dim=48,
        mod={"retention_ratios": [None, 1.0, 1.0, 1.0]},
    )
    import torch

    inputs = {
        "input_ids": torch.tensor([[5] * 16 + [7, 8, 9]]),
        "attention_mask": torch.ones(1, 19, dtype=torch.long),
        "token_type_ids": torch.zeros(1, 19, dtype=torch.long),
        "pixel_values": torch.rand(1, 3, 16, 16),
    }
    with pytest.raises(ValueError, match="an attention mask of its own"), torch.no_grad():
        classes.outer(config).eval()(**inputs)


def test_a_decoder_that_is_known_has_one_class():
    dense = LlamaModel(
        LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    assert decoders.pre_norm_decoder(dense) is decoders.PmodLlamaModel


def deepseek_vl():
    from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil

    mark = "<image_placeholder>"
    tokens = family_models.tokenizer((mark,), image_token=mark)
    processor = transformers.DeepseekVLProcessor(
        DeepseekVLImageProcessorPil(size={"height": 16, "width": 16}),
        tokens,
        num_image_tokens=16,
        chat_template=family_models.chatml(f"{{{{ '{mark}' }}}}", "", system=False),
    )
    tower = family_models.PLAIN_TOWER | {"model_type": "siglip_vision_model", "vision_use_head": False}
    text = {**TEXT, "model_type": "llama"}
    image = tokens.convert_tokens_to_ids(mark)
    return family_models._model(
        "DeepseekVL", tokens, text_config=text, vision_config=tower, image_token_id=image
    ), processor


def qwen3_vl_moe():
    def experts(name, tokens, text_config, **others):
        text_config |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        return make("Qwen3VLMoe", tokens, text_config=text_config, **others)

    make = family_models._model
    with mock.patch.object(family_models, "_model", experts):
        return family_models.qwen3_vl()


@pytest.mark.parametrize("make", [deepseek_vl, qwen3_vl_moe])
def test_other_unlisted_families(make, tmp_path, capsys):
    for part in make():
        part.save_pretrained(tmp_path / "dense")
    assert run("convert", tmp_path / "dense", tmp_path / "pmod", "--any") == 0, capsys.readouterr().err
    noise(random.Random(0), 20, 20).save(tmp_path / "a.png")
    asked = ["--image", tmp_path / "a.png", "--prompt", "Hi", "--max-new-tokens", 2]
    assert run("generate", tmp_path / "pmod", *asked) == 0
    assert run("convert", tmp_path / "pmod", tmp_path / "back", "--to", "baseline") == 0
    same = [tmp_path / name / "model.safetensors" for name in ("back", "dense")]
    assert same[0].read_bytes() == same[1].read_bytes()


def test_no_token_ends_the_answers_of_the_proof():
    dense, processor = family_models.qwen2_5_vl()
    made = processor(
        text=[processor.image_token], images=[noise(random.Random(0), 20, 20)], return_tensors="pt"
    )
    config = dense.config.to_dict()
    assert isinstance(config["text_config"]["eos_token_id"], int)
    tiny, _ = tiny_config(config, dict(made))
    assert tiny["text_config"]["eos_token_id"] is None


@pytest.mark.parametrize("command", [("convert",), ("convert", "--any"), ("inspect",), ("profile",)])
def test_a_whole_config_is_refused_by_its_family(command, tmp_path, capsys):
    config = transformers.AutoConfig.for_model("gemma3n").to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    place = [tmp_path / "out"] if command[0] == "convert" else []
    assert run(command[0], tmp_path, *place, *command[1:]) == 2
    assert "gemma3n cannot become p-MoD: its decoder layers have four norms" in capsys.readouterr().err
