"""The table of bad inputs: each kind of bad file in each place that a command reads, and bad options."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from pmod_cli.checkpoints.shards import read_header, write_shard
from pmod_cli.demo.job import BASELINE
from tests.robustness.runner import Case

BAD_JSON: dict[str, bytes] = {
    "empty": b"",
    "cut": b'{"model_type": "lla',
    "list": b"[]",
    "null": b"null",
    "text": b'"x"',
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 50_000,
    "digits": b'{"model_type": ' + b"1" * 5000 + b"}",
    "latin-1": b'{"model_type": "\xe9"}',
    "bytes": bytes(range(256)),
    "surrogate": b'{"model_type": "\\ud800"}',
    "escape": b'{"model_type": "\\u001b[31mred\\u001b]0;title\\u0007"}',
    "markup": b'{"model_type": "[/q]"}',
}
BAD_VALUES: tuple[Any, ...] = (
    None, True, "[/q]", "\x1b[31m", "\ud800", -1, 0, 10**9, 10**30, 1e300, float("nan"), float("inf"), [], {}, [{}],
)  # fmt: skip
BAD_RECIPES: dict[str, bytes] = {
    "empty": b"",
    "list": b"- a",
    "deep": b"[" * 5000,
    "digits": b"seed: " + b"1" * 5000,
    "date": b"name: 2020-99-99",
    "dated key": b"2020-01-01: 1",
    "tab": b"\tname: x",
    "twice": b"name: a\nname: b",
    "python": b"!!python/object/apply:os.system ['touch hit']",
    "surrogate": b'name: "\\ud800"\nmod: {floor: 2}',
    "latin-1": b"name: \xe9",
    "nul": b"name: \0",
    "unknown": b"mod: {flor: 1}",
    "alias": b"a: &a [*a]",
    "ratios": b"mod: {schedule: explicit, ratios: [" + b"0.5," * 20_000 + b"]}",
}
BAD_SETTINGS = (
    "mod.weight_scale=.nan", "mod.floor=.inf", "mod.floor=1e999", "mod.first_layer=-1", "mod.last_layer=-5",
    "mod.ratios=[1]", "mod.schedule=x", "mod", "=", "mod.floor.x=1", "mod={}}", "train.epochs=.inf",
    "train.max_steps=0", "train.learning_rate=1e999", "train.learning_rate=.nan", "mod.floor=[[[[", "\x1b=1",
    "mod.floor=2020-99-99", "mod.weight_norm=[/q]",
)  # fmt: skip


def make_good(folder: Path) -> None:
    """A dense and a p-MoD checkpoint, a recipe, a picture, the JSON of a profile, and their like."""
    from pmod_cli.conversion.convert import convert
    from pmod_cli.conversion.plan import plan_conversion

    shutil.copytree(BASELINE, folder / "dense")
    convert(plan_conversion(str(folder / "dense")), folder / "pmod", copy=True)
    (folder / "recipe.yaml").write_text("name: good\n")
    Image.new("RGB", (40, 30), "red").save(folder / "picture.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
    records = [{"id": "1", "image": "picture.png", "conversations": turns}]
    (folder / "data.json").write_text(json.dumps(records))
    (folder / "profile.json").write_text(json.dumps({"command": "profile", "result": {}}))


def _write(path: str, content: bytes) -> None:
    Path(path).unlink(missing_ok=True)
    Path(path).write_bytes(content)


def _special(path: str, kind: str) -> None:
    Path(path).unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        Path(path).symlink_to(Path(path).name)
    elif kind == "device":
        Path(path).symlink_to("/dev/zero")
    else:
        Path(path).mkdir()


def _set(path: str, keys: tuple[str, ...], value: Any) -> None:
    data = json.loads(Path(path).read_bytes())
    inner = data
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    _write(path, json.dumps(data).encode())


def _add_tensor(name: str) -> None:
    path = Path("dense/model.safetensors")
    tensors = list(read_header(path).values())
    write_shard(path.with_name("new"), [*tensors, tensors[0].renamed(name)])
    path.with_name("new").replace(path)


_READERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "inspect": (("inspect", "pmod"), ("pmod/config.json",)),
    "convert": (("convert", "dense", "out"), ("dense/config.json",)),
    "convert back": (("convert", "pmod", "out", "--to", "baseline"), ("pmod/config.json",)),
    "profile": (("profile", "dense", "--counter", "formula"), ("dense/config.json",)),
    "compare": (("profile", "--compare", "profile.json", "profile.json"), ("profile.json",)),
    "report": (("report", ".", "-o", "page.html"), ("profile.json",)),
}


def cases() -> Iterator[Case]:
    """All of them, in the same order each time."""
    for name, (words, files) in _READERS.items():
        for file in files:
            for kind, content in BAD_JSON.items():
                yield _case(f"{name}: {file} {kind}", words, partial(_write, file, content))
            for kind in ("pipe", "loop", "device", "folder"):
                yield _case(f"{name}: {file} is a {kind}", words, partial(_special, file, kind))
    config = json.loads((BASELINE / "config.json").read_bytes())
    for keys in _keys(config):
        for value in BAD_VALUES:
            for name in ("convert", "profile"):
                spoil = partial(_set, "dense/config.json", keys, value)
                what = f"{name}: {'.'.join(keys)} = {value!a}"
                yield _case(what, _READERS[name][0], spoil, codes=(0, 2))
    for kind, content in BAD_RECIPES.items():
        for words in (("profile", "dense"), ("convert", "dense", "out")):
            spoil = partial(_write, "recipe.yaml", content)
            yield _case(f"{words[0]}: recipe {kind}", (*words, "--recipe", "recipe.yaml"), spoil)
    for kind in ("pipe", "loop", "device", "folder"):
        spoil = partial(_special, "recipe.yaml", kind)
        yield _case(f"recipe is a {kind}", ("profile", "dense", "--recipe", "recipe.yaml"), spoil)
    for setting in BAD_SETTINGS:
        for words in (("profile", "dense"), ("convert", "dense", "out")):
            yield _case(f"{words[0]}: --set {setting!a}", (*words, "--set", setting))
    for name in ("x" * 5000, "a/b/c", "~nosuchuser/x", "\x1b[31m", "[/q]", "\0", "\udcff", ""):
        for words in (("inspect",), ("profile",), ("convert",), ("report",)):
            rest = {"convert": ("out",), "report": ("-o", "page.html")}.get(words[0], ())
            yield _case(f"{words[0]} {name[:20]!a}", (*words, name, *rest))
    layer = "language_model.model.layers.3000000000000.mlp.up_proj.weight"
    yield _case("convert: a layer far away", ("convert", "dense", "out"), partial(_add_tensor, layer))
    yield _case("stdout closed", ("profile", "dense"), prepare=_close_stdout, says="stdout is closed")


def _case(
    name: str,
    words: tuple[str, ...],
    spoil: Callable[[], object] = lambda: None,
    codes: Any = (2,),
    **more: Any,
) -> Case:
    return Case(name, words, spoil, codes, output=("out", "page.html", "page.md", "page_files"), **more)


def _close_stdout() -> None:
    import sys

    os.close(1)
    sys.stdout = None


def _keys(data: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in data.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from _keys(value, (*above, key))
