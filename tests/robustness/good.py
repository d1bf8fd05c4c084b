"""What the commands read, made once and well: the bad inputs spoil copies of it, the kills go to work on it."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from PIL import Image

LIMITS = (
    "train.max_steps=2",
    "train.save_steps=1",
    "train.global_batch_size=4",
    "train.micro_batch_size=4",
    "train.max_bad_samples=0",
)
FINETUNE = (
    "finetune", "pmod", "--data", "train/train.json", "--images", "train/images", "--recipe", "demo",
    *(word for limit in LIMITS for word in ("--set", limit)),
)  # fmt: skip
LORA = ("--set", "train.max_steps=1", "--set", "train.lora={r: 4, alpha: 8}")
EVAL = ("eval", "pmod", "--tasks", "shapes", "--include-path", "tasks", "--batch-size", "4")


def import_all() -> None:
    """Import what the commands use, for all children at once; nothing is computed, so no threads run.

    What is imported stays: children need not search it for garbage, which would copy its pages.
    """
    import torch

    from pmod_cli.evaluation.catalogue import import_lmms_eval

    torch.set_num_threads(1)
    import_lmms_eval()

    import pmod_cli.conversion.convert
    import pmod_cli.demo.job
    import pmod_cli.doctor
    import pmod_cli.evaluation.adapter
    import pmod_cli.evaluation.command
    import pmod_cli.profiling.command
    import pmod_cli.report
    import pmod_cli.training.finetune
    import pmod_cli.visualize.visualize  # noqa: F401

    gc.freeze()


def make_good(folder: Path) -> None:
    """Make, in a child, a folder with one of everything.

    ``dense`` and ``pmod`` are checkpoints, ``seeing`` one that takes videos, ``train`` and ``tasks`` data, ``tuned`` is
    fine-tuned, ``lora`` an adapter, ``stopped.training`` a run that a kill stopped, ``results`` an evaluation; files
    beside them are of the commands that write files.
    """
    code, _ = in_child(lambda: _make(folder), folder / "log")
    if code:
        raise RuntimeError((folder / "log").read_text())
    (folder / "log").unlink()


def in_child(
    action: Callable[[], object], log: Path, stop: tuple[int, float] | None = None
) -> tuple[int, float]:
    """Run an action in a child; its exit code (minus the signal that killed it) and seconds.

    ``stop`` is a signal, and when to send it.
    """
    began = time.monotonic()
    child = os.fork()
    if not child:
        code = 1
        try:
            with log.open("wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            action()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    if stop is not None:
        time.sleep(stop[1])
        os.kill(child, stop[0])
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), time.monotonic() - began


def _make(folder: Path) -> None:
    import shutil

    from pmod_cli.conversion.convert import convert
    from pmod_cli.conversion.plan import plan_conversion
    from pmod_cli.demo import data, world
    from pmod_cli.demo.job import BASELINE
    from pmod_cli.evaluation.tasks import write_task
    from pmod_cli.recipe import load_recipe
    from tests.common import family_models
    from tests.common.videos import write_video

    os.chdir(folder)
    shutil.copytree(BASELINE, "dense")
    convert(plan_conversion("dense", recipe=load_recipe("demo")), Path("pmod"), copy=True)
    data.write_training_data(Path("train"), 8)
    write_task(Path("tasks"), "shapes", data.write_heldout(Path("heldout"), 1), world.KINDS)
    Path("recipe.yaml").write_text("name: good\n")
    Image.new("RGB", (40, 30), "red").save("picture.png")
    write_video(Path("clip.mkv"), 6)
    for part in family_models.qwen2_5_vl():
        part.save_pretrained("seeing")
    _run(*FINETUNE, "--output", "tuned")
    _run(*FINETUNE, *LORA, "--output", "lora")
    with mock.patch("pmod_cli.training.finetune.save_result", side_effect=KeyboardInterrupt):
        _run(*FINETUNE, "--output", "stopped", code=130)
    _run(*EVAL, "--output", "results")
    shutil.copytree("results", "before")
    ask = ("--image", "picture.png", "--prompt", "What?", "--max-new-tokens", "1", "--baseline", "none")
    _run("visualize", "pmod", *ask, "-o", "kept.png", "--html", "kept.html")
    Path("profile.json").write_text(_run("profile", "pmod", "--counter", "formula", "--json"))


def _run(*words: str, code: int = 0) -> str:
    """Run a command in this process; its output."""
    import io
    from contextlib import redirect_stdout

    from pmod_cli.cli import main

    out = io.StringIO()
    with redirect_stdout(out):
        try:
            main(list(words))
        except SystemExit as end:
            if end.code != code:
                raise RuntimeError(f"pmod {json.dumps(words)}: exit {end.code}") from None
    return out.getvalue()
