"""A p-MoD model whose answers differ from its baseline's, both evaluated on the demo's questions."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(scope="session")
def confused(tmp_path_factory):
    """The demo's baseline with random routers: it drops what it needs, so some answers are wrong."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    from pmod_cli.demo.job import BASELINE
    from pmod_cli.families.llava import PmodLlavaConfig, PmodLlavaForConditionalGeneration
    from pmod_cli.modeling.settings import MoDConfig

    plain = AutoConfig.from_pretrained(BASELINE).to_dict()
    mod = MoDConfig([None, 0.3, 0.2, 0.15, 0.15, 0.15, 0.15, 0.15]).to_dict()
    config = PmodLlavaConfig(**{key: plain[key] for key in plain if key != "model_type"}, mod=mod)
    model = PmodLlavaForConditionalGeneration(config)
    dense = AutoModelForImageTextToText.from_pretrained(BASELINE, dtype=torch.float32)
    model.load_state_dict(dense.state_dict(), strict=False)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "router.weight" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    folder = tmp_path_factory.mktemp("confused") / "confused"
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(BASELINE, backend="pil").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def evaluations(confused, tmp_path_factory):
    """Folder with ``both`` (p-MoD beside its baseline), ``dense`` and ``pmod`` (the same, one at a time)."""
    from pmod_cli.demo import data, world
    from pmod_cli.demo.job import BASELINE
    from pmod_cli.evaluation.evaluate import evaluate
    from pmod_cli.evaluation.options import EvalSettings
    from pmod_cli.evaluation.tasks import write_task

    top = tmp_path_factory.mktemp("evaluations")
    os.environ["LMMS_EVAL_DATASETS_CACHE"] = str(top / "cache")
    questions = data.write_heldout(top / "data" / "shapes", 8)
    write_task(top / "tasks", "shapes", questions, world.KINDS)
    options = {"include_path": str(top / "tasks"), "settings": EvalSettings(batch_size=8)}
    evaluate(confused, ["shapes"], baseline=BASELINE, output=top / "both", **options)
    evaluate(confused, ["shapes"], output=top / "apart" / "pmod", **options)
    evaluate(BASELINE, ["shapes"], output=top / "apart" / "dense", **options)
    return top
