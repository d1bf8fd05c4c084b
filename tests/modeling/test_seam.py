"""The seam is no family's: on four families that pmod does not have yet, made by the same function.

Models are tiny and random: 6 layers, of which the first is dense; both samples have one picture, the second is padded.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen25
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3

from pmod_cli.modeling.compat import CACHE_ARGUMENT
from pmod_cli.modeling.decoders import PmodLlamaModel, PmodQwen2Model, mod_decoder
from pmod_cli.modeling.family import family_classes
from pmod_cli.modeling.schedule import kept_tokens
from pmod_cli.modeling.settings import MoDConfig

IMAGE, VIDEO, START, SLOTS = 5, 6, 8, (4, 6)
RATIOS = [None, 0.75, 0.5, 0.5, 0.25, 0.0]
TEXT: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 14}
TOWER: dict[str, Any] = {**VISION, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56}

PmodQwen25TextModel = mod_decoder(qwen25.Qwen2_5_VLTextModel, qwen25.Qwen2_5_VLDecoderLayer, __name__)
PmodQwen3TextModel = mod_decoder(qwen3.Qwen3VLTextModel, qwen3.Qwen3VLTextDecoderLayer, __name__)
FAMILIES = {
    name: family_classes(
        __name__,
        getattr(transformers, f"{name}Config"),
        getattr(transformers, f"{name}Model"),
        getattr(transformers, f"{name}ForConditionalGeneration"),
        decoders=(decoder,),
    )
    for name, decoder in {
        "Qwen2_5_VL": PmodQwen25TextModel,
        "Qwen3VL": PmodQwen3TextModel,
        "InternVL": PmodQwen2Model,
        "SmolVLM": PmodLlamaModel,
    }.items()
}


def qwen(name: str, **vision: Any) -> tuple[dict[str, Any], int, dict[str, Any]]:
    interleaved = {"mrope_interleaved": True} if name == "Qwen3VL" else {}
    config = {
        "text_config": {
            **TEXT,
            "max_position_embeddings": 512,
            "rope_parameters": ROPE | interleaved,
            "head_dim": 16,
        },
        "vision_config": {
            **VISION,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 64,
            "in_channels": 3,
            **vision,
        },
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": START,
        "vision_end_token_id": 9,
    }
    return config, 8, {"pixel_values": torch.rand(64, 1176), "image_grid_thw": torch.tensor([[1, 4, 8]] * 2)}


def internvl() -> tuple[dict[str, Any], int, dict[str, Any]]:
    config = {
        "text_config": transformers.Qwen2Config(**TEXT),
        "vision_config": {**TOWER, "image_size": [56, 56], "patch_size": [14, 14]},
        "image_token_id": IMAGE,
        "image_seq_length": 4,
        "downsample_ratio": 0.5,
    }
    return config, 8, {"pixel_values": torch.rand(4, 3, 56, 56)}


def smolvlm() -> tuple[dict[str, Any], int, dict[str, Any]]:
    config = {
        "text_config": transformers.LlamaConfig(**TEXT),
        "vision_config": TOWER,
        "image_token_id": IMAGE,
        "scale_factor": 2,
    }
    return config, 4, {"pixel_values": torch.rand(2, 1, 3, 56, 56)}


MAKERS: dict[str, Callable[[], tuple[dict[str, Any], int, dict[str, Any]]]] = {
    "Qwen2_5_VL": lambda: qwen("Qwen2_5_VL", depth=2, window_size=56, fullatt_block_indexes=[1]),
    "Qwen3VL": lambda: qwen("Qwen3VL", depth=4, num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
    "InternVL": internvl,
    "SmolVLM": smolvlm,
}


class Case:
    """A family's dense model, its p-MoD models of the same weights, and inputs."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.classes = FAMILIES[name]
        self.config, self.image_tokens, pixels = MAKERS[name]()
        dense = self.classes.outer.__mro__[2]
        self.dense = dense(dense.config_class(**copy.deepcopy(self.config))).eval()
        self.length = 14 + self.image_tokens
        ids = torch.full((2, self.length), 7)
        for sample, start in enumerate(SLOTS):
            ids[sample, start : start + self.image_tokens] = IMAGE
            ids[sample, start - 1] = START
        mask = torch.ones_like(ids)
        ids[1, :2] = mask[1, :2] = 0
        self.inputs = {"input_ids": ids, "attention_mask": mask, **pixels}
        if name.startswith("Qwen"):
            self.inputs["mm_token_type_ids"] = (ids == IMAGE).long()

    def pmod(self, ratios: list[float | None]) -> Any:
        """The p-MoD model; its routers are zero, as conversion leaves them."""
        config = self.classes.config(**copy.deepcopy(self.config), mod=MoDConfig(ratios).to_dict())
        model = self.classes.outer(config).eval()
        missing, unexpected = model.load_state_dict(self.dense.state_dict(), strict=False)
        assert not unexpected
        assert all(".router." in key for key in missing)
        return model

    def routed(self) -> Any:
        """The p-MoD model with routers that choose."""
        model = self.pmod(RATIOS)
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if ".router." in name:
                torch.nn.init.normal_(parameter, std=0.3)
        return model

    def extended(self, ids: torch.Tensor) -> dict[str, Any]:
        """Inputs for a longer sequence whose new tokens are text."""
        new = ids.shape[1] - self.length
        longer = {**self.inputs, "input_ids": ids}
        for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
            if name in longer:
                longer[name] = torch.nn.functional.pad(longer[name], (0, new), value=value)
        return longer


@pytest.fixture(scope="module", params=MAKERS)
def case(request):
    return Case(request.param)


def test_keeping_every_token_is_the_baseline_exactly(case):
    real = case.inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = case.dense(**case.inputs).logits[real]
        for ratios in ([None] + [1.0] * 5, [1.0] * 6):
            assert torch.equal(case.pmod(ratios)(**case.inputs).logits[real], expected)


def test_greedy_answers_with_a_cache_equal_full_forward_passes(case):
    model = case.routed()
    options = {
        "do_sample": False,
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "suppress_tokens": [IMAGE, VIDEO],
    }
    ids = model.generate(**case.inputs, **options)
    with torch.no_grad():
        logits = model(**case.extended(ids)).logits[:, case.length - 1 : -1]
    logits[..., [IMAGE, VIDEO]] = -float("inf")
    assert torch.equal(logits.argmax(-1), ids[:, case.length :])


def test_each_layer_stores_and_tells_what_it_kept(case):
    model = case.routed()
    with torch.no_grad():
        output = model(**case.inputs, use_cache=True, output_routing=True)
    text = case.length - case.image_tokens
    for layer, ratio in enumerate(RATIOS):
        kept = case.image_tokens if ratio is None else kept_tokens(case.image_tokens, ratio)
        assert output[CACHE_ARGUMENT].layers[layer].keys.shape[-2] == text + kept
        if ratio is not None:
            vision = case.inputs["input_ids"] == IMAGE
            assert (output.routing[layer].kept & vision).sum(-1).tolist() == [kept, kept]
    assert output[CACHE_ARGUMENT].get_seq_length() == case.length
    assert type(output) is case.classes.output


def test_every_router_learns_with_and_without_checkpointing(case):
    gradients = []
    for checkpointing in (False, True):
        model = case.routed().train()
        if checkpointing:
            # transformers 5.24 renamed the method.
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model(**case.inputs, labels=case.inputs["input_ids"], use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if ".router." in n})
    assert len(gradients[0]) == 10
    for name, gradient in gradients[0].items():
        assert gradient.any() or "layers.5" in name  # no layer reads what the last one passes on
        torch.testing.assert_close(gradients[1][name], gradient)


def test_merged_embeddings_generate_what_ids_and_pictures_do(case):
    """Without pictures nothing but ``vision_mask`` tells the tokens apart; positions are those of text."""
    model = case.routed()
    embeds = torch.randn(2, case.length, 64, generator=torch.Generator().manual_seed(0))
    mask, vision = case.inputs["attention_mask"], case.inputs["input_ids"] == IMAGE
    options = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
    made = model.generate(
        inputs_embeds=embeds, attention_mask=mask, vision_mask=vision, return_dict_in_generate=True, **options
    )
    lengths = [layer.keys.shape[-2] for layer in made[CACHE_ARGUMENT].layers]
    text = case.length - case.image_tokens + 3
    assert lengths == [text + case.image_tokens] + [
        text + kept_tokens(case.image_tokens, ratio) for ratio in RATIOS[1:] if ratio is not None
    ]


def test_the_classes_are_what_their_names_say(case):
    model = case.pmod(RATIOS)
    dense = type(case.dense).__name__
    assert type(model).__name__ == f"Pmod{dense}"
    assert type(model).can_generate()
    assert type(model.get_decoder()).__name__ == f"Pmod{type(case.dense.get_decoder()).__name__}"
    assert model.config.model_type == f"pmod_{case.dense.config.model_type}"
    output = case.classes.output(logits=torch.zeros(1), routing=(None,))
    globals()[case.classes.output.__name__] = case.classes.output
    assert pickle.loads(pickle.dumps(output)).routing == (None,)
