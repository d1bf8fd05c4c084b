"""What wraps a model, and copies, casts or moves what goes in and comes out, keeps ``routing``."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, cpu_offload, disk_offload, dispatch_model
from accelerate.state import AcceleratorState
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from pmod_cli.families.llava import PmodLlavaCausalLMOutputWithPast
from pmod_cli.modeling.plan import LayerRouting
from pmod_cli.modeling.settings import MoDConfig
from tests.common.tiny import pad, pictures, prompt, tiny_model

TRAINED = ("ddp", "fsdp2", "fsdp2 in bfloat16", "autocast", "compiled")
OFFLOADED = ("weights on the CPU", "weights on disk", "dispatched")
ROUNDED = ("fsdp2 in bfloat16", "autocast")


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def wrap(request, tmp_path):
    """How a model is wrapped, by name."""

    def ddp(model):
        request.getfixturevalue("process_group")
        return DistributedDataParallel(model, find_unused_parameters=True)

    def fsdp2(model, dtype=torch.float32):
        request.getfixturevalue("process_group")
        policy = MixedPrecisionPolicy(param_dtype=dtype, output_dtype=dtype)
        mesh = init_device_mesh("cpu", (1,))
        for layer in model.model.language_model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        return fully_shard(model, mesh=mesh, mp_policy=policy)

    def dispatched(model):
        places = {"model.vision_tower": "cpu", "model.multi_modal_projector": "disk", "lm_head": "cpu"}
        places["model.language_model"] = "disk"
        return dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)

    def autocast(model):
        AcceleratorState._reset_state(reset_partial_state=True)  # another test may have left one
        request.addfinalizer(lambda: AcceleratorState._reset_state(reset_partial_state=True))
        return Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)

    wraps = {
        "ddp": ddp,
        "fsdp2": fsdp2,
        "fsdp2 in bfloat16": lambda model: fsdp2(model, torch.bfloat16),
        "weights on the CPU": lambda model: cpu_offload(model, torch.device("cpu")),
        "weights on disk": lambda model: disk_offload(model, str(tmp_path), torch.device("cpu")),
        "dispatched": dispatched,
        "autocast": autocast,
        "compiled": lambda model: torch.compile(model, backend="eager", dynamic=True),
    }
    yield lambda name: wraps[name]
    torch._dynamo.reset()


@pytest.mark.parametrize("name", [*TRAINED, *OFFLOADED])
def test_the_routing_comes_through(name, wrap):
    ids, mask = pad([prompt(1, 6), prompt(2, 3)], "right")
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pictures(3), "labels": ids}
    model = tiny_model(mod=MoDConfig([None, 0.4]), num_hidden_layers=2).train(name in TRAINED)
    with torch.no_grad():
        expected = model(**inputs, output_routing=True, use_cache=False)
    wrapped = wrap(name)(model)
    with torch.set_grad_enabled(name in TRAINED):
        output = wrapped(**inputs, output_routing=True, use_cache=False)
    assert type(output) is PmodLlavaCausalLMOutputWithPast
    assert [type(layer) for layer in output.routing] == [type(None), LayerRouting]
    rounded = name in ROUNDED
    ours, plain = output.routing[1], expected.routing[1]
    torch.testing.assert_close(ours.weights.float(), plain.weights, rtol=0, atol=0.1 if rounded else 1e-5)
    assert torch.equal(ours.kept.sum(-1), plain.kept.sum(-1))
    assert rounded or torch.equal(ours.kept, plain.kept)
    assert float(output.loss) == pytest.approx(float(expected.loss), rel=0.02 if rounded else 1e-5)
    if name == "autocast":
        assert output.logits.dtype == torch.float32  # accelerate has cast the output
    if name in TRAINED:
        output.loss.backward()
        assert all(parameter.grad is not None for parameter in model.model.language_model.parameters())
