"""The table of bad inputs: bad files in each place that a command reads, bad options, streams and limits."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.robustness import files
from tests.robustness.good import EVAL, FINETUNE
from tests.robustness.runner import Case

ASK = ("--image", "picture.png", "--prompt", "What?", "--max-new-tokens", "1")
WATCH = ("--video", "clip.mkv", "--frames", "4", "--prompt", "What?", "--max-new-tokens", "1")
TRAIN = ("train/train.json", "--images", "train/images")

COMMANDS: dict[str, tuple[str, ...]] = {
    "inspect": ("inspect", "pmod"),
    "convert": ("convert", "dense", "out"),
    "convert back": ("convert", "pmod", "out", "--to", "baseline"),
    "merge": ("convert", "lora", "out", "--merge"),
    "check": ("data", "check", *TRAIN),
    "fix": ("data", "check", *TRAIN, "--fix", "out.json"),
    "finetune": (*FINETUNE, "--set", "train.max_steps=1", "--output", "out"),
    "resume": (*FINETUNE, "--output", "stopped", "--resume"),
    "calibrate": (
        "calibrate",
        "pmod",
        "--data",
        *TRAIN,
        "--samples",
        "24",
        "--max-new-tokens",
        "1",
        "-o",
        "out",
    ),
    "generate": ("generate", "pmod", *ASK),
    "watch": ("generate", "seeing", *WATCH),
    "serve": ("serve", "pmod", "--port", "0"),
    "eval": (*EVAL, "--output", "results"),
    "diff": ("eval", "--diff", "before", "results"),
    "profile": ("profile", "dense", "--counter", "formula", "--image", "picture.png"),
    "latency": (
        "profile",
        "pmod",
        "--latency",
        "--repeats",
        "1",
        "--new-tokens",
        "1",
        "--counter",
        "formula",
    ),
    "compare": ("profile", "--compare", "profile.json", "profile.json"),
    "visualize": ("visualize", "pmod", *ASK, "--baseline", "none", "-o", "out.png", "--html", "out.html"),
    "report": ("report", ".", "-o", "page.html"),
    "demo": ("demo", "--output", "demo", "--steps", "1", "--train-images", "8", "--heldout-images", "2"),
    "doctor": ("doctor",),
}
"""By name, a command that works on the good folder."""

OUTPUT = (
    "out",
    "out.json",
    "out.png",
    "out.html",
    "out.training",
    "page.html",
    "page.md",
    "page_files",
    "demo",
)
_OUTPUTS = {"resume": ("stopped", "stopped.training"), "eval": ("results",), "diff": ("results",)}
"""What they may write."""

_CHECKPOINT = (
    "config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "generation_config.json",
)
_READS: dict[str, tuple[str, ...]] = {
    "inspect": ("pmod/config.json", "pmod/model.safetensors.index.json"),
    "convert": tuple(f"dense/{name}" for name in _CHECKPOINT),
    "convert back": ("pmod/config.json", "pmod/baseline/manifest.json", "pmod/model.safetensors.index.json"),
    "merge": ("lora/adapter_config.json", "lora/processor_config.json", "lora/tokenizer.json"),
    "check": ("train/train.json",),
    "fix": ("train/train.json",),
    "finetune": ("train/train.json", "pmod/config.json", "pmod/processor_config.json"),
    "resume": (
        "stopped.training/run.json",
        "stopped.training/metrics.jsonl",
        "stopped.training/checkpoint-2/trainer_state.json",
        "stopped.training/.pmod",
    ),
    "calibrate": ("train/train.json", "pmod/config.json"),
    "generate": tuple(f"pmod/{name}" for name in (*_CHECKPOINT, "model.safetensors.index.json")),
    "watch": ("seeing/config.json", "seeing/processor_config.json"),
    "eval": ("results/results.json", "results/samples/shapes.jsonl", "results/.pmod"),
    "diff": ("results/results.json", "results/samples/shapes.jsonl"),
    "profile": ("dense/config.json", "dense/processor_config.json"),
    "latency": ("pmod/config.json",),
    "compare": ("profile.json",),
    "visualize": ("pmod/config.json", "pmod/processor_config.json"),
    "report": (
        "profile.json",
        "tuned/training.json",
        "tuned/metrics.jsonl",
        "tuned/config.json",
        "results/results.json",
        "results/samples/shapes.jsonl",
    ),
}
"""Which JSON of the good folder they read."""

_MUST = {("inspect", "pmod/config.json"), ("convert", "dense/config.json"), ("compare", "profile.json")}
"""What a command cannot do without."""

_SETTINGS = (
    "mod.weight_scale=.nan", "mod.floor=.inf", "mod.floor=1e999", "mod.first_layer=-1", "mod.last_layer=-5",
    "mod.ratios=[1]", "mod.schedule=x", "mod", "=", "mod.floor.x=1", "mod={}}", "train.epochs=.inf",
    "train.max_steps=0", "train.learning_rate=1e999", "train.learning_rate=.nan", "mod.floor=[[[[", "\x1b=1",
    "mod.floor=2020-99-99", "mod.weight_norm=[/q]", "train.seed=-1", "train.seed=1e30", f"train.seed={10**30}",
    "mod.first_layer=90", "mod.ratio=0.2",
    "train.router_learning_rate=-1", "train.learning_rate=yes",
    "train.epochs=1e300", "train.lora={r: 100000}",
    "train.attn_implementation=[/q]", "train.max_steps=1e30", "\udcff=1",
)  # fmt: skip
_NAMES = (
    "x" * 5000,
    "a/b/c",
    "~nosuchuser/x",
    "\x1b[31m",
    "[/q]",
    "\0",
    "\udcff",
    "",
    "/dev/zero",
    "picture.png/x",
)
_NUMBERS = ("nan", "inf", "-1", "0", "1e999", "9" * 5000, "x", "", "1" + "0" * 30)
_TEXTS = ("", "\udcff", "\x1b[31m", "<image>" * 50, "[/q]", "x" * 200_000, "\0", "{{ 1/0 }}")

_OPTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "inspect": {"--revision": _NAMES},
    "convert": {"--recipe": _NAMES, "--vision-tower": _NAMES, "--projector": _NAMES, "--tokenizer": _NAMES,
                "--to": _TEXTS, "--set": _SETTINGS, "--revision": _NAMES},
    "check": {"--images": _NAMES, "--model": _NAMES, "--recipe": _NAMES, "--max-length": _NUMBERS,
              "--limit": _NUMBERS, "--fix": _NAMES},
    "finetune": {"--data": _NAMES, "--images": _NAMES, "--recipe": _NAMES, "--set": _SETTINGS, "--output": _NAMES},
    "calibrate": {"--data": _NAMES, "--images": _NAMES, "--samples": _NUMBERS, "--flops": _NUMBERS, "--kv": _NUMBERS,
                  "--schedule": _TEXTS, "--min-agreement": _NUMBERS, "--max-new-tokens": ("nan", "-1", "0", "x"),
                  "--batch-size": ("nan", "-1", "0", "x"), "--seed": ("nan", "x"), "--output": _NAMES,
                  "--device": ("hpu", "[/q]"), "--dtype": _TEXTS},
    "serve": {"--port": (*(each for each in _NUMBERS if each != "0"), "70000"), "--host": _NAMES, "--images": _NAMES,
              "--device": ("hpu", "[/q]"), "--dtype": _TEXTS, "--kernels": _TEXTS, "--cache": _TEXTS},
    "generate": {"--image": _NAMES, "--prompt": _TEXTS, "--max-new-tokens": _NUMBERS, "--dtype": _TEXTS,
                 "--device": ("hpu", "cuda:99", "cpu:0", "cpu:1", "meta", "mps", "xla", "[/q]", "", "\udcff"),
                 "--kernels": _TEXTS, "--cache": _TEXTS},
    "watch": {"--video": (*_NAMES, "http://127.0.0.1:9/x.mp4", "concat:clip.mkv|clip.mkv"), "--frames": _NUMBERS,
              "--prompt": ("<video>" * 5, "<image>", "<|video_pad|>")},
    "eval": {"--tasks": (*_TEXTS, "nosuchtask", "../x", ",", "shapes,shapes"), "--baseline": _NAMES,
             "--output": _NAMES, "--batch-size": (*_NUMBERS, "auto:x"), "--limit": _NUMBERS,
             "--include-path": _NAMES, "--min": ("x", "shapes", "shapes=", "shapes=nan", "\x1b=1", "shapes=1e999"),
             "--max-drop": _NUMBERS, "--max-new-tokens": _NUMBERS, "--dtype": _TEXTS, "--device": ("hpu", "[/q]")},
    "profile": {"--recipe": _NAMES, "--set": _SETTINGS, "--baseline": _NAMES, "--image": _NAMES,
                "--image-size": (*_NUMBERS, "0x0", "1x", "336x336x3", "1e9x1", "99999999x99999999", "-1x5"),
                "--text-tokens": _NUMBERS, "--new-tokens": _NUMBERS, "--batch": _NUMBERS, "--sweep": _TEXTS,
                "--schedules": _TEXTS, "--plot": (*_NAMES, "x.png/y.png", "x.txt"), "--max-flops-ratio": _NUMBERS,
                "--repeats": _NUMBERS, "--device": ("hpu", "[/q]"), "--dtype": _TEXTS},
    "visualize": {"--image": _NAMES, "--prompt": _TEXTS, "-o": (*_NAMES, "x.txt", "dense", "x.PNG/y.png"),
                  "--gif": _NAMES, "--html": _NAMES, "--baseline": _NAMES, "--max-new-tokens": _NUMBERS,
                  "--layers": (*_NUMBERS, ",", "1,", "1,,2", "99", "0x1", "1" * 5000), "--device": ("hpu", "[/q]")},
    "report": {"-o": (*_NAMES, "x.txt", "pmod", "pmod/x.txt"), "--include-path": _NAMES},
    "demo": {"--output": (*_NAMES, "dense", "train/images", "picture.png"), "--steps": _NUMBERS,
             "--train-images": _NUMBERS, "--heldout-images": _NUMBERS},
    "doctor": {"--timeout": ("nan", "-1", "0", "x", "", "\udcff")},
}  # fmt: skip
"""Values that cannot be meant, by option; typer has the last of an option's values count."""

_WRITES = {"--output", "-o", "--fix", "--plot", "--gif", "--html"}
"""Options that name what is written."""

_WRITE_OPTIONS = (
    ("convert", ""), ("merge", ""), ("finetune", "--output"), ("calibrate", "--output"), ("eval", "--output"),
    ("demo", "--output"), ("visualize", "-o"), ("visualize", "--gif"), ("visualize", "--html"), ("report", "-o"),
    ("fix", "--fix"), ("profile", "--plot"),
)  # fmt: skip
_PLACES = (
    ".",
    "..",
    "/",
    "/proc",
    "photos",
    "photos/",
    "link",
    "photos/2020/..",
    "pmod/baseline/..",
    "pipe",
    "dense",
    "pmod",
    "train",
)
"""Outputs that are a user's, an input, above one, or no files."""

_IGNORED = (
    ("visualize", ("--baseline", "pmod")),
    ("convert", ("--vision-tower", "dense")),
    ("convert", ("--private",)),
    ("convert back", ("--tokenizer", "dense")),
    ("convert back", ("--any",)),
    ("merge", ("--copy",)),
    ("diff", ("--min", "shapes=1")),
    ("generate", ("--frames", "4")),
    ("compare", ("--latency",)),
)


def cases(good: Path) -> Iterator[Case]:
    """All of them, in the same order each time; ``good`` is what they spoil copies of."""
    yield from _files()
    yield from _values(good)
    yield from _formats(good)
    yield from _options()
    yield from _places()
    yield from _planted()
    yield from _data()
    yield from _results()
    yield from _surroundings()


def _files() -> Iterator[Case]:
    for name, paths in _READS.items():
        for path in paths:
            codes = (2,) if (name, path) in _MUST else (0, 1, 2)
            for kind, content in files.JSON.items():
                yield _case(name, f"{path} {kind}", partial(files.write, path, content), codes=codes)
            for kind in files.KINDS:
                yield _case(name, f"{path} is a {kind}", partial(files.replace, path, kind), codes=codes)


def _values(good: Path) -> Iterator[Case]:
    for name, paths in _READS.items():
        for path in paths:
            keys = files.keys_of(good / path)
            few = 2 if len(keys) > 40 else 5
            for place in random.Random(f"{name} {path}").sample(keys, min(len(keys), 100)):
                what = f"{path}: {'.'.join(map(str, place))}"
                for value in random.Random(what).sample(files.VALUES, few):
                    spoil = partial(files.set_value, path, place, value)
                    yield _case(name, f"{what} = {value!a:.40}", spoil, codes=(0, 1, 2))


def _formats(good: Path) -> Iterator[Case]:
    for kind, content in files.RECIPES.items():
        spoil = partial(files.write, "recipe.yaml", content)
        for name in ("profile", "convert", "finetune", "check"):
            more = ("--recipe", "recipe.yaml")
            yield _case(name, f"recipe {kind}", spoil, more=more, codes=(0, 2) if kind == "laughs" else (2,))
    for kind in files.KINDS:
        spoil = partial(files.replace, "recipe.yaml", kind)
        yield _case("profile", f"recipe is a {kind}", spoil, more=("--recipe", "recipe.yaml"))
    for kind, content in files.TASKS.items():
        spoil = partial(files.write, "tasks/shapes.yaml", content)
        yield _case("eval", f"task {kind}", spoil, codes=(0, 2))
    for kind, (line, code) in files.TASK_LINES.items():
        written, codes = (("out",), (1, 2)) if "score" in kind else ((), (2,))
        spoil = partial(files.add_to_task, line, code)
        yield _case(
            "eval", f"task with {kind}", spoil, words=(*EVAL, "--output", "out"), output=written, codes=codes
        )
    for kind, content in files.TEMPLATES.items():
        for name in ("generate", "finetune", "visualize"):
            path = "pmod/chat_template.jinja"
            yield _case(name, f"template {kind}", partial(files.write, path, content), codes=(0, 1, 2))
    for kind, content in files.pictures().items():
        for name, path in (
            ("generate", "picture.png"), ("visualize", "picture.png"), ("profile", "picture.png"),
            ("check", "train/images/00000.png"), ("finetune", "train/images/00000.png"), ("report", "kept.png"),
        ):  # fmt: skip
            yield _case(name, f"picture {kind}", partial(files.write, path, content), codes=(0, 1, 2))
    for kind, content in files.videos((good / "clip.mkv").read_bytes()).items():
        codes = (0, 2) if kind.startswith("spoiled") else (2,)
        yield _case("watch", f"video {kind}", partial(files.write, "clip.mkv", content), codes=codes)
    for kind in files.KINDS:
        yield _case("watch", f"clip.mkv is a {kind}", partial(files.replace, "clip.mkv", kind))
    for kind in files.KINDS:
        for name, path in (
            ("generate", "picture.png"), ("visualize", "picture.png"), ("profile", "picture.png"),
            ("check", "train/images/00000.png"), ("finetune", "train/images/00000.png"), ("report", "kept.png"),
            ("generate", "pmod/chat_template.jinja"), ("convert", "dense/model.safetensors"),
            ("inspect", "pmod/model-routers.safetensors"), ("generate", "pmod/model-routers.safetensors"),
            ("merge", "lora/adapter_model.safetensors"),
            ("eval", "tasks/shapes.yaml"), ("report", "kept.html"), ("report", "results/report.md"),
        ):  # fmt: skip
            yield _case(name, f"{path} is a {kind}", partial(files.replace, path, kind), codes=(0, 1, 2))
    for name, path in (
        ("convert", "dense/model.safetensors"), ("profile", "dense/model.safetensors"),
        ("inspect", "pmod/model-routers.safetensors"), ("convert back", "pmod/model-routers.safetensors"),
        ("generate", "pmod/model-routers.safetensors"), ("latency", "pmod/model-routers.safetensors"),
        ("merge", "lora/adapter_model.safetensors"), ("resume", "stopped.training/checkpoint-1/model.safetensors"),
    ):  # fmt: skip
        for kind, content in files.weights((good / path).read_bytes()).items():
            yield _case(name, f"{path} {kind}", partial(files.write, path, content), codes=(0, 2))

    for leaf in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        path = f"stopped.training/checkpoint-2/{leaf}"
        for kind, content in {
            "empty": b"",
            "of zeros": bytes(5000),
            "cut": (good / path).read_bytes()[:700],
        }.items():
            # The random numbers' state is not read after the last step.
            codes = (0, 2) if leaf == "rng_state.pth" else (2,)
            yield _case("resume", f"{path} {kind}", partial(files.write, path, content), codes=codes)
        yield _case("resume", f"{path} is gone", partial(_unlink, path), codes=codes)
    yield _case(
        "resume", "a folder checkpoint-x", partial(_make, "stopped.training/checkpoint-x"), codes=(0,)
    )
    yield _case("resume", "an empty checkpoint-9", partial(_make, "stopped.training/checkpoint-9"))
    for value in ("../dense/model.safetensors", "/etc/passwd", "w.bin", "gone.safetensors", 3):
        for name in ("inspect", "convert back", "generate", "latency", "visualize", "finetune", "calibrate"):
            path = "pmod/model.safetensors.index.json"
            spoil = partial(_rename_shard, path, value)
            yield _case(name, f"safetensors index names {value}", spoil)
    for kind, content in files.PICKLES.items():
        spoil = partial(_pickle, "dense/model.safetensors", "dense/pytorch_model.bin", content)
        for dry in ((), ("--dry-run",)):
            yield _case("convert", f"pickle {kind}", spoil, more=("--allow-pickle", *dry))
        spoil = partial(_pickle, "lora/adapter_model.safetensors", "lora/adapter_model.bin", content)
        yield _case("merge", f"pickle {kind}", spoil, more=("--allow-pickle",))
        yield _case("merge", f"pickle {kind}, not allowed", spoil, says="--allow-pickle")
    for key, value in files.ADAPTER.items():
        spoil = partial(files.set_value, "lora/adapter_config.json", (key,), value)
        yield _case("merge", f"{key} {value!a:.40}", spoil, codes=(0,) if key == "target_modules" else (2,))
    for name in ("generate", "finetune", "calibrate", "visualize"):
        for keys in (("attn_implementation",), ("vision_config", "_attn_implementation")):
            spoil = partial(files.set_value, "pmod/config.json", keys, "evil/evil")
            yield _case(name, f"{'.'.join(keys)} of the hub", spoil, says="code from the hub")

    for name in ("convert", "convert back", "calibrate"):
        path = f"{'dense' if name == 'convert' else 'pmod'}/chat_template.jinja"
        spoil = partial(files.plant, {path: "../seeing/chat_template.jinja"})
        yield _case(name, f"{path}, a link out", spoil, says="link out")
    spoil = partial(files.set_value, "pmod/processor_config.json", ("image_processor", "crop_size"), [1, 2])
    yield _case("calibrate", "crop_size [1, 2]", spoil, says="do not fit")
    for value in ("\0", "\ud800", "..", ""):
        spoil = partial(files.set_value, "pmod/baseline/manifest.json", ("files", value), "config.json")
        yield _case("convert back", f"manifest names {value!a}", spoil, says="not a file")
    for keys, size in (
        (("vision_config", "num_channels"), 10**5), (("vision_config", "intermediate_size"), 10**6),
        (("text_config", "vocab_size"), 10**8),
    ):  # fmt: skip
        for name in ("generate", "finetune", "calibrate", "merge"):
            spoil = partial(files.set_value, "pmod/config.json", keys, size)
            yield _case(name, f"{keys[1]} {size}", spoil)


def _unlink(path: str) -> None:
    Path(path).unlink()


def _make(path: str) -> None:
    Path(path).mkdir()


def _rename_shard(path: str, value: object) -> None:
    """Have an index say that its tensors are in another file."""
    index = json.loads(Path(path).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], value)
    files.write(path, json.dumps(index).encode())


def _pickle(old: str, new: str, content: bytes) -> None:
    Path(old).unlink()
    Path(new).write_bytes(content)


def _options() -> Iterator[Case]:
    for name, options in _OPTIONS.items():
        for option, values in options.items():
            for value in values:
                given = (*COMMANDS[name], option, value)
                named = (Path(value).parts or ("",))[0] if option in _WRITES else ""
                more = (named, f"{named}.training", f"{named}_files", f"{named}.md")
                yield _case(name, f"{option} {value!a:.40}", words=given, codes=(0, 1, 2), writes=more)
    for name in ("inspect", "convert", "check", "finetune", "calibrate", "generate", "serve", "eval", "profile",
                 "visualize", "report"):  # fmt: skip
        place = 2 if name == "check" else 1
        for value in (*_NAMES, "picture.png", "train", "-", "--", "-5", "user/name", "../user/name"):
            words = COMMANDS[name]
            given = (*words[:place], value, *words[place + 1 :])
            yield _case(name, f"of {value!a:.40}", words=given, codes=(0, 1, 2))
    for name, words in _IGNORED:
        yield _case(name, f"{words[0]}, which it would ignore", more=words)
    for name in COMMANDS:
        yield _case(name, "an option that is not there", more=("--nosuch",))
        yield _case(name, "a word too many", more=("\x1b[31mx", "y", "z"))


def _places() -> Iterator[Case]:
    """Outputs that are not pmod's to replace."""
    for name, option in _WRITE_OPTIONS:
        for place in _PLACES:
            for force in ((),) if name == "demo" else ((), ("--force",)):
                given = (
                    (*COMMANDS[name], option, place)
                    if option
                    else (*COMMANDS[name][:2], place, *COMMANDS[name][3:])
                )
                given += force
                what = " ".join(("onto", ascii(place), option, *force))
                yield _case(name, what, _users_things, words=given, output=())

    for name, option in (("calibrate", "--output"), ("finetune", "--output"), ("eval", "--output")):
        for place in ("train", "pmod") if name != "eval" else ("pmod", "before", "tasks"):
            words = (*COMMANDS[name], option, place, "--force")
            codes, output = ((0,), ("before",)) if place == "before" else ((2,), ())
            yield _case(name, f"onto its own {place}", words=words, codes=codes, output=output)


def _planted() -> Iterator[Case]:
    """Markers, links and folders that a stranger put where pmod works: nothing is lost, and nothing written through."""
    for name, words in (
        ("eval", (*EVAL, "--output", "run")),
        ("demo", (*COMMANDS["demo"], "--output", "run")),
    ):
        spoil = partial(files.plant, {"run/.pmod": "../picture.png"})
        yield _case(name, "planted marker, a link", spoil, words=words, output=())
    for name, place in (("convert", ".out.partial"), ("report", ".page.html.partial"), ("fix", ".out.json.partial"),
                        ("calibrate", ".out.calibrating"), ("finetune", "out.training")):  # fmt: skip
        for target in ("pmod", "train", "results"):
            yield _case(
                name, f"planted {place}, a link to {target}", partial(files.plant, {place: target}), output=()
            )
        yield _case(name, f"planted {place}, a copy", partial(shutil.copytree, "tuned", place), output=())
    for name, place in (
        ("eval", "results/samples"), ("eval", "results/answers"), ("eval", "results/submissions"),
        ("eval", "results/error.log"), ("eval", "results/lmms-eval.log"), ("eval", "results/.pmod"),
        ("resume", "stopped.training/metrics.jsonl"), ("resume", "stopped.training/saving"),
        ("resume", "stopped.training/runs"), ("resume", "stopped.training/.pmod"),
    ):  # fmt: skip
        target = "../train" if "." not in Path(place).name else "../picture.png"
        yield _case(name, f"planted {place}, a link", partial(files.plant, {place: target}), output=())
    twice = partial(os.link, "stopped.training/metrics.jsonl", "backup.jsonl")
    yield _case("resume", "a hard link to its metrics", twice, output=())
    yield _case("eval", "planted pipe", partial(files.replace, "results/lmms-eval.log", "pipe"), output=())
    for kind, mark in files.MARKS.items():
        for name, words in (
            ("convert", ("convert", "dense", "dl", "--force")),
            ("finetune", (*FINETUNE, "--output", "dl", "--force")),
            ("finetune", (*FINETUNE, "--output", "work", "--force")),
            ("convert", ("convert", "dense", "new")),
            ("report", ("report", ".", "-o", "dl/thesis.html", "--force")),
            ("visualize", (*COMMANDS["visualize"], "--html", "dl/thesis.md", "--force")),
        ):
            spoil = partial(_downloaded, mark)
            yield _case(name, f"planted marker {kind} {words[-2]}", spoil, words=words, output=())
    for page in ("results/report.html", "kept.html", "tuned/kept.html"):
        words = ("report", "results" if page.startswith("results") else ".", "-o", page, "--force")
        copy = partial(shutil.copy, "kept.html", "tuned/kept.html")
        yield _case("report", f"planted page {page}", copy, words=words, output=())
    folder = partial(Path("pmod/sub").mkdir)
    words = ("convert", "dense", "pmod", "--force")
    yield _case("convert", "planted folder of the user's", folder, words=words, output=())


def _data() -> Iterator[Case]:
    """Folders of data that lead out of themselves, and records that take too much."""
    for kind in files.TABLES:
        for name, words in (
            ("check", ("data", "check", "tab")),
            ("finetune", (*FINETUNE, "--data", "tab", "--output", "out")),
        ):
            yield _case(name, f"table {kind}", partial(files.table, kind), words=words)
    for kind, content in files.RECORDS.items():
        for name, words in (
            ("check", (*COMMANDS["check"], "--model", "pmod")),
            ("finetune", COMMANDS["finetune"]),
        ):
            spoil = partial(files.write, "train/train.json", content)
            yield _case(name, f"records {kind}", spoil, words=words, codes=(0, 2))
    spoil = partial(files.set_value, "train/train.json", (0, "image"), "\x1b[31m.png")
    words = (*COMMANDS["finetune"], "--set", "train.max_bad_samples=1")
    yield _case("finetune", "a missing picture with codes", spoil, words=words, codes=(0,))
    for suffix in ("json", "jsonl"):
        spoil, words = (
            partial(files.set_all, "train/train.json", "image", 3),
            (*COMMANDS["check"], "--fix", f"out.{suffix}"),
        )
        yield _case(
            "fix", f"no good record, {suffix}", spoil, words=words, says="no usable record", output=()
        )
    for path in ("x.parquet", "user/name"):
        for kind in files.KINDS[:-1]:
            spoil = partial(files.place, path, kind)
            yield _case("check", f"{path} is a {kind}", spoil, words=("data", "check", path))


def _results() -> Iterator[Case]:
    """Results whose parts are each well, and not together; and such that would take gigabytes or all day."""
    for kind, (path, keys, value) in files.RESULTS.items():
        spoil = partial(files.set_value, path, keys, value)
        yield _case("report", f"results with {kind}", spoil, codes=(0,))
    for key, value in (("doc_id", 10**30), ("doc_id", -1), ("prompt", [1]), ("prompt", None)):
        for name in ("diff", "report"):
            spoil = partial(files.change_answer, key, value)
            more = ("--include-path", "tasks")
            yield _case(name, f"changed answer, {key} = {value!a:.40}", spoil, more=more, codes=(0,))
    for name, path in (
        ("report", "tuned/metrics.jsonl"), ("report", "results/samples/shapes.jsonl"), ("report", "kept.png"),
        ("diff", "results/samples/shapes.jsonl"),
    ):  # fmt: skip
        yield _case(name, f"{path} of 20 GB", partial(files.inflate, path), codes=(0, 2))
    for kind, value in (("NaN", float("nan")), ("a number beyond floats", 10**400)):
        spoil = partial(files.set_value, "profile.json", ("result", "ratios", "prefill_flops"), value)
        words = ("profile", "--compare", "profile.json", "before/profile.json")
        copy = partial(_both, partial(shutil.copy, "profile.json", "before/profile.json"), spoil)
        yield _case("compare", kind, copy, words=words, codes=(0,))
        yield _case("compare", f"{kind} --json", copy, words=(*words, "--json"), codes=(0,))


def _both(first: Callable[[], object], second: Callable[[], object]) -> None:
    first()
    second()


def _downloaded(mark: bytes) -> None:
    """A folder with a marker of a stranger's, into which a user put their own."""
    for folder in ("dl", "work.training", ".new.partial"):
        Path(folder).mkdir()
        Path(folder, ".pmod").write_bytes(mark)
        for suffix in ("txt", "md", "html"):
            Path(folder, f"thesis.{suffix}").write_bytes(b"a user's")


def _users_things() -> None:
    for folder in ("photos", "photos/2020", "out.training", "page_files"):
        Path(folder).mkdir()
        Path(folder, "photo.png").write_bytes(b"a user's")
    for name in ("photo.png", "photo.html", "photo.json", "page.html"):
        Path(name).write_bytes(b"a user's")
        Path(f"link to {name}").symlink_to(name)
    for folder in ("pmod", "train"):
        Path(folder, "photo.png").write_bytes(b"a user's")
    Path("link").symlink_to("photos")
    os.mkfifo("pipe")


def _surroundings() -> Iterator[Case]:
    for name in COMMANDS:
        if name in ("demo", "serve"):  # one is long, the other without end
            continue
        yield _case(name, "stdout closed", prepare=_close_stdout, says="stdout is closed")
        yield _case(name, "stderr closed", prepare=_close_stderr, codes=(0, 1))
        yield _case(name, "ASCII alone", prepare=_ascii, codes=(0, 1))
        yield _case(name, "a full disk behind stdout", prepare=_full, codes=(0, 2))
        for number in (16, 40):
            limit = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (number, number))
            yield _case(name, f"{number} open files", prepare=limit, codes=(0, 1, 2))
        for size in (2000, 20_000):  # of which the first takes what goes to stderr
            limit = partial(_largest_file, size)
            kept = (".out.calibrating",) if name == "calibrate" else ()  # with it the same command goes on
            yield _case(name, f"files of {size} bytes", prepare=limit, codes=(0, 1, 2), writes=kept)
    for name, words in (
        ("convert", ("convert", "dense", "new/er/out")),
        ("finetune", (*COMMANDS["finetune"], "--output", "new/er/out")),
    ):
        yield _case(
            name,
            "a full disk below new folders",
            words=words,
            prepare=partial(_largest_file, 2000),
            output=(),
        )
    for name in ("finetune", "calibrate", "eval", "demo"):
        words = (*EVAL, "--output", "out") if name == "eval" else COMMANDS[name]
        yield _case(name, "a full disk at once", words=words, prepare=partial(_largest_file, 50), output=())
    yield _case("merge", "files of 5000 bytes alone", prepare=partial(_largest_file, 5000), output=())
    for name in ("convert", "convert back", "merge"):
        for repository in ("", "a/b/c", "\x1b[31m", "\udcff", "user/name"):
            words = (*COMMANDS[name], "--push-to-hub", repository)
            yield _case(name, f"a push to {repository!a}", words=words, says="--push-to-hub", output=())
    dangling = partial(files.plant, {"dangling": "nowhere"})
    for place in ("~/x", ".pmod", "dangling/x"):
        yield _case("convert", f"onto {place}", dangling, words=("convert", "dense", place), output=())
    for name in ("convert", "finetune", "visualize", "report", "fix"):
        yield _case(name, "in a folder that is gone", _leave, says="the working folder is gone")
    for name in ("convert", "generate", "eval", "report"):
        yield _case(name, "umask 777", prepare=partial(os.umask, 0o777), says="umask 777")
        variable = "PYTORCH_ALLOC_CONF"  # over which torch would abort
        yield _case(name, f"{variable}=x", environment={variable: "x"}, says=variable)
    for name in COMMANDS:
        if name not in ("demo", "doctor", "serve"):
            yield _case(name, "among names with codes", _odd_names, codes=(0, 1))


def _close_stdout() -> None:
    os.close(1)
    sys.stdout = None


def _close_stderr() -> None:
    os.close(2)
    sys.stderr = None


def _ascii() -> None:
    for name, number in (("stdout", 1), ("stderr", 2)):
        setattr(sys, name, open(number, "w", encoding="ascii", closefd=False))  # noqa: SIM115


def _full() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115


def _largest_file(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def _leave() -> None:
    Path("gone").mkdir()
    os.chdir("gone")
    Path("../gone").rmdir()


def _odd_names() -> None:
    for name in ("\x1b[31mx.json", "[b]q.json", "javascript:x.html", "a\nb.png"):
        Path(name).write_text("{}")
    os.link("profile.json", os.fsencode("\udcff.json"))


def _case(
    name: str,
    what: str,
    spoil: Callable[[], object] = lambda: None,
    *,
    words: tuple[str, ...] | None = None,
    more: tuple[str, ...] = (),
    codes: tuple[int, ...] = (2,),
    writes: tuple[str, ...] = (),
    output: tuple[str, ...] | None = None,
    **rest: Any,
) -> Case:
    given = (*(words or COMMANDS[name]), *more)
    written = (*(_OUTPUTS.get(name, OUTPUT) if output is None else output), *writes)
    return Case(f"{name}: {what}", given, spoil, codes, output=written, **rest)
