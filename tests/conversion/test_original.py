"""The original LLaVA format: dense checkpoints in the names of LLaVA's own code."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText

from pmod_cli.checkpoints.source import open_source
from pmod_cli.cli import main
from pmod_cli.conversion.convert import convert, convert_back
from pmod_cli.conversion.formats import Options, find_format
from pmod_cli.conversion.plan import plan_conversion
from pmod_cli.modeling.schedule import shifted_cosine
from pmod_cli.output.errors import PmodError
from tests.common.llava_checkpoints import save_original
from tests.common.tiny import IMAGE, dense_counterpart, pictures, prompt, tiny_model


def original(tmp_path, decoder="llama", family="llava", layout=None, **changes):
    """A random dense model, and its checkpoint in the original format."""
    model = tiny_model(family, decoder, mod=None)
    return model, save_original(tmp_path / "source", model, **(layout or {}), changes=changes)


@pytest.mark.parametrize(
    ("decoder", "family", "layout", "changes"),
    [
        ("llama", "llava", {"pickled": True, "shards": 2, "tower_inside": False}, {}),
        ("llama", "llava_next", {}, {}),
        ("mistral", "llava_next", {"shards": 2}, {"sliding_window": None}),
        ("qwen2", "llava", {"tower_inside": False}, {}),
    ],
)
def test_baseline_and_routers(tmp_path, decoder, family, layout, changes):
    model, source = original(tmp_path, decoder, family, layout, **changes)
    assert find_format(open_source(source)) == "original"
    options = Options(allow_pickle=True)
    done = convert(plan_conversion(source, options=options), tmp_path / "pmod")
    assert (done["format"], done["family"], done["recipe"]) == ("original", family, "default")
    pmod = AutoModelForImageTextToText.from_pretrained(tmp_path / "pmod")
    assert pmod.config.mod_config.retention_ratios == shifted_cosine(8)
    routers = [value for name, value in pmod.state_dict().items() if ".router." in name]
    assert len(routers) == 2 * len(pmod.config.mod_config.mod_layers)
    assert not any(router.any() for router in routers)
    for name, value in model.state_dict().items():
        if name not in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(pmod.state_dict()[name], value), name

    convert_back(str(tmp_path / "pmod"), tmp_path / "dense")
    dense, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(dense).__name__.startswith("LlavaFor" if family == "llava" else "LlavaNextFor")
    inputs = {"input_ids": torch.tensor([prompt(2, 9)]), "pixel_values": pictures(2)}
    if family == "llava_next":
        pixels, sizes = torch.randn(1, 5, 3, 20, 20), torch.tensor([[40, 40]])
        ids = prompt(1, 9, tokens=25 + 10 * 11)
        inputs = {"input_ids": torch.tensor([ids]), "pixel_values": pixels, "image_sizes": sizes}
    with torch.no_grad():
        expected = dense_counterpart(model)(**inputs).logits[..., :IMAGE]
        torch.testing.assert_close(dense(**inputs).logits[..., :IMAGE], expected, atol=1e-6, rtol=0)
        routed = pmod(**inputs).logits[..., :IMAGE]
    assert not torch.allclose(routed, expected, atol=1e-3)


def test_first_release_of_llava_is_told_from_transformers_own(tmp_path):
    _, source = original(tmp_path)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "llava"}))
    assert find_format(open_source(source)) == "original"


def test_the_image_processor_is_the_towers(tmp_path):
    _, source = original(tmp_path)
    convert(plan_conversion(source), tmp_path / "pmod")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "pmod")
    assert (processor.backend, processor.do_pad) == ("pil", True)
    assert list(processor.image_mean) == [0.5, 0.4, 0.3]


def test_a_tower_beside_the_checkpoint(tmp_path):
    _, source = original(tmp_path, layout={"tower_inside": False})
    (source / "tower").rename(tmp_path / "tower")
    assert plan_conversion(source).translation.config["vision_config"]["image_size"] == 20


def test_square_pictures_are_cropped(tmp_path):
    _, source = original(tmp_path, image_aspect_ratio="square")
    convert(plan_conversion(source), tmp_path / "pmod")
    assert AutoImageProcessor.from_pretrained(tmp_path / "pmod").do_pad is False


def test_a_known_tower_needs_no_download_if_its_weights_are_inside(tmp_path):
    _, source = original(tmp_path, mm_vision_tower="/someone/elses/disk/clip-vit-large-patch14-336")
    with pytest.raises(PmodError, match=r"class_embedding has shape \[16\], and its config says \[1024\]"):
        plan_conversion(source)
    # Its geometry was known (and is another than the tiny one's); the user's word counts more.
    plan_conversion(source, options=Options(vision_tower=str(source / "tower")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_vision_tower": None}, "names no vision tower"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is not supported"),
        ({"mm_vision_select_feature": "slicefour"}, "mm_vision_select_feature 'slicefour' is not supported"),
        ({"hidden_size": 40}, "hidden_size is 32, and 40 by config.json"),
        ({"sliding_window": 4096}, None),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, capsys, changes, message):
    decoder = "mistral" if "sliding_window" in changes else "llama"
    _, source = original(tmp_path, decoder, **changes)
    with pytest.raises(SystemExit) as stopped:
        main(["convert", str(source), str(tmp_path / "pmod")])
    assert stopped.value.code == 2
    printed = capsys.readouterr().err.strip()
    assert "\n" not in printed
    assert (message or "sliding window") in printed
    assert not (tmp_path / "pmod").exists()
