"""Time and memory of ``pmod convert`` on a checkpoint of LLaVA-1.5-7B's size; not a test.

python tests/benchmarks/convert.py                   13 GB in three shards, like llava-hf/llava-1.5-7b-hf
python tests/benchmarks/convert.py --copy            with real copies of the weights (takes 13 GB of disk)
python tests/benchmarks/convert.py --released        from the paper's released format, which is written anew (likewise)

The checkpoint is sparse: its headers are true and its data are holes, which take no disk.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pmod_cli.profiling.geometry import find_geometry

SHARD_BYTES = 4_990_000_000
FIRST_MOD_LAYER = 8
RELEASED = {
    "model_type": "pmod_llava_llama",
    "image_aspect_ratio": "pad",
    "mm_hidden_size": 1024,
    "mm_patch_merge_type": "flat",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mod_bias_enabled": True,
    "mod_router_factor": 0.5,
    "mod_target_layers": "shiftedcos_decay_0.85_0.15",
    "mod_target_token_type": "vision_all",
    "mod_weight_norm": "tanh_0.2_1",
    "tie_word_embeddings": False,
}


def main() -> None:
    """Make the checkpoint, then convert it a few times in fresh processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--copy", action="store_true")
    parser.add_argument("--released", action="store_true")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, default=None, help="Where to work; the system's temporary folder."
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source = Path(folder) / "llava-1.5-7b"
        size, parameters, shards = make_checkpoint(source, options.released)
        print(
            f"{parameters / 1e9:.3f} billion parameters, {size / 1e9:.2f} GB in {shards} shards (fp16, sparse)"
        )
        words = ["convert", str(source), f"{folder}/pmod", "--json", "--force"]
        words += [] if options.released else ["--recipe", "llava-1.5-7b"]
        words += ["--copy"] if options.copy else []
        for run in range(options.runs):
            seconds, peak, result = measure(words)
            print(
                f"run {run}: whole process {seconds:.2f} s, peak {peak / 1e6:.0f} MB; "
                f"conversion itself {result['seconds']:.2f} s; {result['methods']}"
            )


def measure(words: list[str]) -> tuple[float, int, dict]:
    """Run ``pmod WORDS`` in a process of its own: seconds, peak resident bytes, its JSON result."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "pmod_cli", *words], stdout=subprocess.PIPE)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        raise SystemExit(f"pmod {' '.join(words)} failed")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), json.loads(output)["result"]


def make_checkpoint(folder: Path, released: bool = False) -> tuple[int, int, int]:
    """Write the checkpoint; returns its bytes, parameters and shards."""
    folder.mkdir()
    config = (find_geometry("llava-1.5-7b") or {})["config"]
    assert config is not None
    text, vision = config["text_config"], config["vision_config"]
    if released:
        text = {**text, "vocab_size": 32000}
        config = {**text, **RELEASED}
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "float16"}))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    used = 0
    named = tensors(text, vision)
    for name, shape in released_tensors(named, text["hidden_size"]) if released else named:
        size = 2 * math.prod(shape)
        if used + size > SHARD_BYTES:
            shards.append({})
            used = 0
        shards[-1][name] = shape
        used += size
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        write_sparse(folder / file, shard)
    total = sum(math.prod(shape) for shard in shards for shape in shard.values())
    index = {"metadata": {"total_size": 2 * total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")), total, len(shards)


def write_sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of fp16 zeros whose data is a hole."""
    header, position = {}, 0
    for name, shape in shapes.items():
        end = position + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + position)


def tensors(text: dict, vision: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, in the names that the hub's checkpoint has."""
    wide, inner, vocab = text["hidden_size"], text["intermediate_size"], text["vocab_size"]
    see, see_inner = vision["hidden_size"], vision["intermediate_size"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    tower = "vision_tower.vision_model"
    yield f"{tower}.embeddings.class_embedding", (see,)
    yield f"{tower}.embeddings.patch_embedding.weight", (see, 3, vision["patch_size"], vision["patch_size"])
    yield f"{tower}.embeddings.position_embedding.weight", (patches + 1, see)
    for layer in range(vision["num_hidden_layers"]):
        prefix = f"{tower}.encoder.layers.{layer}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield f"{prefix}.self_attn.{part}.weight", (see, see)
            yield f"{prefix}.self_attn.{part}.bias", (see,)
        yield f"{prefix}.mlp.fc1.weight", (see_inner, see)
        yield f"{prefix}.mlp.fc1.bias", (see_inner,)
        yield f"{prefix}.mlp.fc2.weight", (see, see_inner)
        yield f"{prefix}.mlp.fc2.bias", (see,)
        for norm in ("layer_norm1", "layer_norm2"):
            yield f"{prefix}.{norm}.weight", (see,)
            yield f"{prefix}.{norm}.bias", (see,)
    for norm in ("pre_layrnorm", "post_layernorm"):
        yield f"{tower}.{norm}.weight", (see,)
        yield f"{tower}.{norm}.bias", (see,)
    for name, width in (("linear_1", see), ("linear_2", wide)):
        yield f"multi_modal_projector.{name}.weight", (wide, width)
        yield f"multi_modal_projector.{name}.bias", (wide,)
    yield "language_model.model.embed_tokens.weight", (vocab, wide)
    for layer in range(text["num_hidden_layers"]):
        prefix = f"language_model.model.layers.{layer}"
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{prefix}.self_attn.{part}.weight", (wide, wide)
        for part, shape in (
            ("gate_proj", (inner, wide)),
            ("up_proj", (inner, wide)),
            ("down_proj", (wide, inner)),
        ):
            yield f"{prefix}.mlp.{part}.weight", shape
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{norm}.weight", (wide,)
    yield "language_model.model.norm.weight", (wide,)
    yield "language_model.lm_head.weight", (vocab, wide)


def released_tensors(
    named: Iterator[tuple[str, tuple[int, ...]]], hidden: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The same in the names of the paper's release, and its routers."""
    for name, shape in named:
        name = name.replace("vision_tower.", "model.vision_tower.vision_tower.")
        name = name.replace("language_model.model.", "model.").replace("language_model.", "")
        name = name.replace("multi_modal_projector.linear_1", "model.mm_projector.0")
        name = name.replace("multi_modal_projector.linear_2", "model.mm_projector.2")
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer and int(layer[1]) >= FIRST_MOD_LAYER:
            name = name.replace(layer[0], layer[0] + "decoder_layer.")
        yield name, shape
    for number in range(FIRST_MOD_LAYER, 32):
        yield f"model.layers.{number}.router.router.weight", (1, hidden)
        yield f"model.layers.{number}.router.router.bias", (1,)


if __name__ == "__main__":
    main()
