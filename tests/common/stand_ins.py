"""What the documentation's commands find in the folder that they are run in.

Models of the hub and data sets are replaced by the demo's, or by tiny ones in other formats, under the names that the
pages use: a folder named
``llava-hf/llava-1.5-7b-hf`` is taken before the hub is asked. Sizes come down to what a test can afford.
"""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

from tests.common.llava_checkpoints import flat_config, released_weights, save_checkpoint, save_original
from tests.common.parts_checkpoints import save_parts, sentencepiece_model
from tests.common.small_demo import ARGUMENTS
from tests.common.tiny import tiny_model

OUTPUT_OPTIONS = {"--output", "-o", "--fix", "--plot", "--html", "--gif"}

SMALL_TRAINING = [
    f"--set=train.{setting}"
    for setting in (
        "max_steps=1",
        "global_batch_size=2",
        "micro_batch_size=2",
        "dtype=float32",
        "num_workers=0",
        "image_aspect_ratio=processor",
    )
]


class StandIns:
    """Fills a folder with what a command names.

    Args:
        folder: Where the commands are run.
        demo: Output folder of a small demo.
    """

    def __init__(self, folder: Path, demo: Path) -> None:
        self.folder, self.demo = folder, demo
        models = demo / "models"
        self.models = {
            "llava-hf/llava-1.5-7b-hf": models / "baseline",
            "my-llava": models / "baseline",
            "pmod-llava-1.5-7b": models / "pmod",
            "start": models / "pmod-start",
            "runs/dense": models / "dense-control",
            "runs/pmod": models / "pmod",
        }

    def provide(self, arguments: list[str]) -> None:
        """Put in place the inputs that a command names, unless an earlier command of the page made them."""
        outputs = {value for option, value in itertools.pairwise(arguments) if option in OUTPUT_OPTIONS}
        if arguments[0] == "convert" and len(arguments) > 2:
            outputs.add(arguments[2])
        for argument in arguments:
            name = argument.removeprefix("./")
            place = self.folder / name
            if argument in outputs or place.exists() or name.startswith("-"):
                continue
            top = name.split("/")[0]
            if name in self.models:
                shutil.copytree(self.models[name], place)
            elif name == "liuhaotian/llava-v1.5-7b":
                save_original(place, tiny_model(mod=None), pickled=True)
            elif name == "p-MoD-LLaVA-NeXT-7B":
                model = tiny_model("llava_next")
                vision = model.config.vision_config
                save_checkpoint(
                    place,
                    flat_config(model, mod_target_layers="shiftedcos_decay_0.85_0.15", mod_router_factor=0.5),
                    released_weights(model),
                    vision_config=vision,
                    pickled=True,
                )
            elif name in {"vicuna", "lmsys/vicuna-7b-v1.5"}:
                self._write_parts()
            elif top == "pmod-demo" and not (self.folder / top).exists():
                (self.folder / top).symlink_to(self.demo)
            elif place.suffix in {".jpg", ".png"} and top != "pmod-demo":
                shutil.copy(self.demo / "data" / "example.png", place)
            elif name in {"data", "images"}:
                place.symlink_to(self.demo / "data" / "train" / "images")
            elif place.suffix in {".json", ".jsonl"} and arguments[0] in {"data", "finetune", "calibrate"}:
                self._write_data(place)

    def _write_parts(self) -> None:
        """Language model, tower and projector, under the names of the hub and of folders."""
        save_parts(self.folder, sentencepiece_model())
        for part, name in (
            ("vicuna", "lmsys/vicuna-7b-v1.5"),
            ("clip", "openai/clip-vit-large-patch14-336"),
            ("stage1", "liuhaotian/llava-v1.5-mlp2x-336px-pretrain-vicuna-7b-v1.5"),
        ):
            shutil.copytree(self.folder / part, self.folder / name)

    def _write_data(self, place: Path) -> None:
        records = json.loads((self.demo / "data" / "train" / "train.json").read_text())
        if place.suffix == ".jsonl":
            place.write_text("\n".join(json.dumps(record) for record in records))
        else:
            place.write_text(json.dumps(records))

    def scaled_down(self, arguments: list[str]) -> list[str]:
        """The same command at a size that a test can afford, on the CPU, without the hub's data sets."""
        words = list(arguments)
        for option, value in (("--device", "cpu"), ("--batch-size", "8")):
            if option in words:
                words[words.index(option) + 1] = value
        if words[0] == "finetune":
            words += SMALL_TRAINING
        elif words[0] == "profile" and "--latency" in words:
            words += ["--new-tokens", "2", "--repeats", "1"]
        elif words[0] == "calibrate":
            words += ["--samples", "24"]
        elif words[0] == "demo":
            words = ["demo", "--output", str(self.demo), *ARGUMENTS]
        elif words[0] == "eval" and "--tasks" in words:
            words[words.index("--tasks") + 1] = "pmod_demo"
            if "--min" in words:
                words[words.index("--min") + 1] = "pmod_demo=60"
            if "--include-path" not in words:
                words += ["--include-path", str(self.demo / "tasks")]
            if "--prepare" not in words and "--limit" not in words:
                words += ["--limit", "4"]
        return words
