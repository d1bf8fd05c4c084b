"""What every model has to do, in the spirit of transformers' ``ModelTesterMixin`` and ``GenerationTesterMixin``."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch
from transformers import AutoModelForImageTextToText, GenerationMixin, StaticCache
from transformers.models.auto import CONFIG_MAPPING

from pmod_cli.families import FAMILIES, load_families
from pmod_cli.generation import VisionLanguageModel
from pmod_cli.modeling.compat import CACHE_ARGUMENT
from pmod_cli.modeling.schedule import kept_tokens
from pmod_cli.prompts import Prompt
from tests.common import onevision_models
from tests.common.eval_models import make_model, make_processor, noise
from tests.common.family_models import MAKERS, pmod_of
from tests.common.tiny import enable_checkpointing

RATIOS = [None, 0.75, 0.5, 0.25]
RNG = random.Random(0)
PICTURES = (noise(RNG, 24, 20), noise(RNG, 9, 40))
GREEDY = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}


def llava():
    processor = make_processor()
    return make_model(processor), processor


def llava_onevision():
    processor = onevision_models.processor()
    processor.chat_template = onevision_models.TEMPLATE
    return onevision_models.dense_model(), processor


MODELS = {"llava": llava, "llava_onevision": llava_onevision, **MAKERS}


@pytest.fixture(scope="class", params=MODELS)
def made(request):
    dense, processor = MODELS[request.param]()
    layers = dense.config.text_config.num_hidden_layers
    model = pmod_of(dense, [*RATIOS, *[0.5] * (layers - 4)])
    prompts = [Prompt("<image> w5 w6", PICTURES[:1]), Prompt("w7 <image>", PICTURES[1:])]
    inputs = dict(VisionLanguageModel(model, processor).encode(prompts))
    return model, inputs, dense


@pytest.fixture
def model(made):
    return copy.deepcopy(made[0])


@pytest.fixture
def inputs(made):
    return dict(made[1])


def logits(model, inputs, **options):
    with torch.no_grad():
        return model(**inputs, **options).logits[inputs["attention_mask"].bool()]


class TestEveryModel:
    def test_save_and_load(self, model, inputs, tmp_path):
        expected = logits(model, inputs)
        model.save_pretrained(tmp_path)
        loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert type(loaded) is type(model)
        assert torch.equal(logits(loaded.eval(), inputs), expected)
        for name, parameter in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], parameter), name

    def test_classes(self, model):
        assert GenerationMixin in type(model).__bases__
        assert type(model).can_generate()
        assert CONFIG_MAPPING[model.config.model_type] is type(model.config)
        assert model.get_decoder() is model.model.get_decoder()

    def test_tied_weights(self, model, inputs, tmp_path):
        config = copy.deepcopy(model.config)
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
        tied = type(model)(config).eval()
        assert tied.lm_head.weight is tied.get_input_embeddings().weight
        tied.save_pretrained(tmp_path)
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
        assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
        assert torch.equal(logits(loaded, inputs), logits(tied, inputs))

    def test_resized_embeddings(self, model, inputs):
        expected, rows = logits(model, inputs), model.get_input_embeddings().num_embeddings
        model.resize_token_embeddings(rows + 10)
        found = logits(model, inputs)
        assert found.shape[-1] == rows + 10 == model.config.text_config.vocab_size
        torch.testing.assert_close(found[:, :rows], expected)
        assert model.generate(**inputs, **GREEDY).shape[1] == inputs["input_ids"].shape[1] + 4

    def test_embeddings_in_place_of_ids(self, model, inputs):
        """Placeholders are found by their embedding; M-RoPE reads the ids, which then have to be given as positions."""
        expected = logits(model, inputs)
        ids = inputs.pop("input_ids")
        embeds = model.get_input_embeddings()(ids)
        if "mm_token_type_ids" in inputs:
            grids = {key: value for key, value in inputs.items() if key.endswith("grid_thw")}
            positions, _ = model.model.get_rope_index(
                ids,
                attention_mask=inputs["attention_mask"],
                mm_token_type_ids=inputs["mm_token_type_ids"],
                **grids,
            )
            inputs["position_ids"] = positions
        torch.testing.assert_close(logits(model, inputs, inputs_embeds=embeds), expected)

    def test_gradient_checkpointing(self, model, inputs):
        losses, gradients = [], []
        for enabled in (False, True):
            trained = copy.deepcopy(model).train()
            if enabled:
                enable_checkpointing(trained)
            loss = trained(**inputs, labels=inputs["input_ids"], use_cache=False).loss
            loss.backward()
            losses.append(loss.detach())
            gradients.append({n: p.grad for n, p in trained.named_parameters() if ".router.weight" in n})
        torch.testing.assert_close(*losses)
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient)
            assert gradient.any() or f"layers.{len(gradients[0])}." in name

    def test_every_cache_gives_the_same_answer(self, model, inputs):
        greedy = {**GREEDY, "suppress_tokens": [model.config.image_token_id]}
        expected = model.generate(**inputs, **greedy)
        length = expected.shape[1]
        static = StaticCache(config=model.config.text_config, max_cache_len=length)
        # transformers 5.24 renamed the option.
        given = "cache" if hasattr(model, "activation_checkpointing_enable") else "past_key_values"
        for options in (
            {"use_cache": False},
            {"cache_implementation": "static"},
            {given: static},
        ):
            assert torch.equal(model.generate(**inputs, **greedy, **options), expected), options

    def test_beams_and_several_answers(self, model, inputs):
        beams = model.generate(**inputs, **GREEDY, num_beams=2)
        assert beams.shape == (2, inputs["input_ids"].shape[1] + 4)
        several = model.generate(**inputs, max_new_tokens=2, do_sample=True, num_return_sequences=2)
        assert len(several) == 4

    def test_eager_attention(self, model, inputs):
        expected = logits(model, inputs)
        model.set_attn_implementation("eager")
        torch.testing.assert_close(logits(model, inputs), expected, atol=2e-4, rtol=1e-3)

    def test_each_layer_stores_and_tells_what_it_kept(self, model, inputs):
        with torch.no_grad():
            output = model(**inputs, use_cache=True, output_routing=True)
        vision = inputs["input_ids"] == model.config.image_token_id
        real = inputs["attention_mask"].bool()
        cache = output[CACHE_ARGUMENT]
        for layer, ratio in enumerate(model.model.mod.retention_ratios):
            if ratio is None:
                assert cache.layers[layer].keys.shape[-2] == real.shape[1]
                continue
            kept = output.routing[layer].kept
            expected = [kept_tokens(count, ratio) for count in vision.sum(-1).tolist()]
            assert (kept & vision).sum(-1).tolist() == expected
            assert kept[real & ~vision].all()
            assert cache.layers[layer].keys.shape[-2] == int(kept.sum(-1).max())
        assert cache.get_seq_length() == real.shape[1]

    def test_merged_embeddings_are_routed_by_the_vision_mask(self, model, inputs):
        """Without pictures nothing else tells the tokens apart; positions are those of text."""
        vision, mask = inputs["input_ids"] == model.config.image_token_id, inputs["attention_mask"]
        width = model.config.text_config.hidden_size
        embeds = torch.randn(*vision.shape, width, generator=torch.Generator().manual_seed(0))
        made = model.generate(
            inputs_embeds=embeds,
            attention_mask=mask,
            vision_mask=vision,
            return_dict_in_generate=True,
            **GREEDY,
        )
        real, counts = mask.sum(-1).tolist(), vision.sum(-1).tolist()
        for layer, ratio in zip(made[CACHE_ARGUMENT].layers, model.model.mod.retention_ratios, strict=True):
            kept = [
                mask.shape[1] if ratio is None else total - count + kept_tokens(count, ratio)
                for total, count in zip(real, counts, strict=True)
            ]
            assert layer.keys.shape[-2] == max(kept) + 3

    def test_outputs_can_be_pickled(self, model, inputs):
        output = model(**inputs, output_routing=True)
        with torch.no_grad():
            copied = pickle.loads(pickle.dumps(type(output)(logits=torch.zeros(1), routing=(None,))))
        assert copied.routing == (None,)
        assert type(output).__module__ == type(model).__module__

    def test_fused_kernels(self, model, inputs):
        """On the CPU their operators run the references; `triton_checks` holds the kernels to these."""
        expected = logits(model, inputs)
        model.get_decoder().kernels = "fused"
        torch.testing.assert_close(logits(model, inputs), expected, atol=2e-4, rtol=1e-3)

    def test_outputs_as_tuple_and_hidden_states(self, model, inputs):
        with torch.no_grad():
            output = model(**inputs, output_hidden_states=True, output_routing=True, use_cache=False)
            as_tuple = model(**inputs, return_dict=False, use_cache=False)
        assert torch.equal(as_tuple[0], output.logits)
        assert len(output.hidden_states) == model.config.text_config.num_hidden_layers + 1
        assert [layer is None for layer in output.routing] == [
            r is None for r in model.model.mod.retention_ratios
        ]

    def test_half_precision(self, model, inputs):
        model = model.to(torch.bfloat16)
        inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
        assert torch.isfinite(logits(model, inputs)).all()
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}

    def test_wrong_numbers_of_placeholders_are_told_as_transformers_does(self, made, model, inputs):
        ids, image = inputs["input_ids"], model.config.image_token_id
        inputs["input_ids"] = ids.masked_fill(ids == image, 7)
        inputs["input_ids"][0, -1] = image
        try:
            made[2](**inputs)
        except (ValueError, RuntimeError) as error:
            expected = error
        else:
            pytest.skip("transformers 5.17 does not compare them in this family")
        with pytest.raises(type(expected)) as found:
            model(**inputs)
        assert str(found.value) == str(expected)


def test_every_listed_family_is_registered():
    load_families()
    for family in FAMILIES:
        config = CONFIG_MAPPING[family.model_type]
        assert AutoModelForImageTextToText._model_mapping[config].__name__ == family.architecture
