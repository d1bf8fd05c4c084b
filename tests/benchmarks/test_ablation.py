"""What the ablation compares differs in what it says, and in nothing else."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from pmod_cli.modeling.schedule import mean_retention
from pmod_cli.modeling.settings import MoDConfig
from tests.common.tiny import pictures, prompt, tiny_model


@pytest.fixture(scope="module")
def ablation():
    path = Path(__file__).parents[2] / "tools" / "ablation.py"
    spec = importlib.util.spec_from_file_location("ablation", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_schedules_keep_as_much(ablation):
    ratios = {shape: ablation.schedule(shape) for shape in ("cosine", "linear", "constant")}
    assert [mean_retention(each) for each in ratios.values()] == pytest.approx([ablation.RETENTION] * 3)
    assert ratios["cosine"] != ratios["linear"]
    for shape in ("cosine", "linear"):
        assert ratios[shape] == sorted(ratios[shape], reverse=True)
        assert min(ratios[shape]) >= ablation.FLOOR


def test_skipped_tokens_pass_unweighted(ablation):
    model = tiny_model(mod=MoDConfig([None, *[0.2] * 7]))
    layer = model.model.language_model.layers[3]
    seen = {}

    def look(module, args, kwargs, output):
        seen[weighted] = (args[0] if args else kwargs["hidden_states"], output)

    layer.register_forward_hook(look, with_kwargs=True)
    ids = torch.tensor([prompt(1, 9)])
    for weighted in (True, False):
        with ablation.weighting(weighted), torch.no_grad():
            routing = model(ids, pixel_values=pictures(1), output_routing=True).routing[3]
        into, out = seen[weighted]
        skipped = ~routing.kept
        factor = routing.weights[skipped][:, None] if weighted else 1.0
        torch.testing.assert_close(out[skipped], into[skipped] * factor)
        assert (routing.weights[skipped] - 1).abs().max() > 0.01


def test_the_table_has_means_and_spans(ablation):
    rows = ablation.table({"one": {"0": [0.5, 0.25], "1": [1.0, 0.75]}, "none yet": {}}).splitlines()
    assert rows[2:] == ["| one | 75.0 (50.0 to 100.0) | 0.500 (0.250 to 0.750) | 2 |"]
