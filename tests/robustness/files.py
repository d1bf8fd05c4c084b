"""Bad files: contents for each format that the commands read, and what a path may be instead of a file."""

from __future__ import annotations

import io
import json
import os
import random
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

JSON: dict[str, bytes] = {
    "empty": b"",
    "cut": b'{"model_type": "lla',
    "list": b"[]",
    "null": b"null",
    "text": b'"x"',
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 50_000,
    "deep and whole": b'{"x":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "digits": b'{"model_type": ' + b"1" * 5000 + b"}",
    "latin-1": b'{"model_type": "\xe9"}',
    "bytes": bytes(range(256)),
    "surrogate": b'{"model_type": "\\ud800"}',
    "escape": b'{"model_type": "\\u001b[31mred\\u001b]0;title\\u0007"}',
    "markup": b'{"model_type": "[/q]"}',
}
VALUES: tuple[Any, ...] = (
    None, True, "[/q]", "\x1b[31m", "\ud800", -1, 0, 10**9, 10**30, 1e300, float("nan"), float("inf"), [], {}, [{}],
    "../../etc/passwd", "x" * 100_000,
)  # fmt: skip
RECIPES: dict[str, bytes] = {
    "empty": b"",
    "list": b"- a",
    "deep": b"[" * 5000,
    "digits": b"seed: " + b"1" * 5000,
    "date": b"name: 2020-99-99",
    "dated key": b"2020-01-01: 1",
    "tab": b"\tname: x",
    "twice": b"name: a\nname: b",
    "twice inside": b"name: a\nmod: {floor: 0.1, floor: 0.2}",
    "python": b"!!python/object/apply:os.system ['touch hit']",
    "surrogate": b'name: "\\ud800"\nmod: {floor: 2}',
    "latin-1": b"name: \xe9",
    "nul": b"name: \0",
    "unknown": b"mod: {flor: 1}",
    "alias": b"a: &a [*a]",
    "laughs": b"a: &a [x,x,x,x,x,x,x,x]\n"
    + b"".join(b"%c: &%c [%s]\n" % (i, i, b",".join([b"*%c" % (i - 1)] * 8)) for i in range(98, 112)),
    "ratios": b"mod: {schedule: explicit, ratios: [" + b"0.5," * 20_000 + b"]}",
    "key of a list": b"? [a, b]\n: 1",
    "not a text": b"name: {a: 1}",
    "two documents": b"name: a\n---\nname: b",
}
TASKS: dict[str, bytes] = {
    **{key: RECIPES[key] for key in ("empty", "list", "deep", "digits", "date", "twice", "nul", "alias")},
    "no data": b"task: shapes\n",
    "a function that is not there": b"task: shapes\ndataset_path: parquet\nprocess_results: !function a.b\n",
    "another name": b"task: other\n",
    "a name that leads out": b"task: ../shapes\ndataset_path: parquet\n",
    "markup": b"task: '[/q]'\n",
    "a group of none": b"group: shapes\ntask: []\n",
    "includes itself": b"include: shapes.yaml\ntask: shapes\n",
}
TASK_LINES: dict[str, tuple[str, str]] = {
    "metrics that are text": ("metric_list: x", ""),
    "repeats beyond reason": ("repeats: 1000000", ""),
    "keywords that are a number": ("dataset_kwargs: 5", ""),
    "a split that is a number": ("test_split: 5", ""),
    "code that ends the program": ("doc_to_text: !function u.f", "import sys\ndef f(doc): sys.exit(0)\n"),
    "code whose score is endless": (
        "process_results: !function u.f",
        "def f(*a): return {'exact_match': 1e999}\n",
    ),
    "code that gives no score": ("process_results: !function u.f", "def f(doc, results): return None\n"),
}
"""By kind, a line for the good task, and code that it names."""
TEMPLATES: dict[str, bytes] = {
    "empty": b"",
    "open": b"{{",
    "no end": b"{% for a in messages %}",
    "no such filter": b"{{ messages | nosuch }}",
    "by zero": b"{{ 1 / 0 }}",
    "undefined": b"{{ a.b.c }}",
    "large": b"{{ 'x' * 100000000 }}",
    "gigabytes": b"{{ 'x' * 10000000000 }}",
    "loops in loops": b"{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "long loop": b"{% for a in range(100000000) %}x{% endfor %}",
    "raises": b"{{ raise_exception('\x1b[31m no [/q]') }}",
    "attribute": b"{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "latin-1": b"\xe9",
    "no image": b"{{ messages[0].content[0].type }}",
}


def pictures() -> dict[str, bytes]:
    """By kind, the bytes of what is no picture, or of one that must not be decoded."""

    def png(width: int, height: int, chunks: bytes = b"") -> bytes:
        head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        return (
            b"\x89PNG\r\n\x1a\n"
            + _chunk(b"IHDR", head)
            + chunks
            + _chunk(b"IDAT", b"x")
            + _chunk(b"IEND", b"")
        )

    text = zlib.compress(b"x" * 100_000_000, 9)
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    whole = buffer.getvalue()
    buffer = io.BytesIO()
    Image.new("1", (13_000, 13_000)).save(buffer, "PNG")
    bits = buffer.getvalue()
    kept = PngImagePlugin.PngInfo()
    kept.add_text("Software", "pmod visualize\x1b[31m")
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "PNG", pnginfo=kept)
    return {
        "empty": b"",
        "text": b"no picture",
        "cut": whole[: len(whole) // 2],
        "head alone": whole[:8],
        "bomb": png(100_000, 100_000),
        "larger bomb": png(2**31 - 1, 2**31 - 1),
        "of bits": bits,
        "no width": png(0, 10),
        "huge text": png(10, 10, _chunk(b"zTXt", b"Software\0\0" + text)),
        "many texts": png(10, 10, _chunk(b"tEXt", b"Software\0" + b"x" * 1000) * 5000),
        "long line": png(10, 100_000),
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "gif": b"GIF89a" + b"\xff" * 20,
        "escape": buffer.getvalue(),
    }


def videos(good: bytes) -> dict[str, bytes]:
    """By kind, the bytes of what is no video, names others, or is spoiled in places."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    rng = random.Random(0)
    spoiled = {}
    for number in range(20):
        content = bytearray(good)
        for _ in range(1 + number):
            content[rng.randrange(len(content))] = rng.randrange(256)
        spoiled[f"spoiled {number}"] = bytes(content)
    return {
        "empty": b"",
        "text": b"no video",
        "head alone": good[:60],
        "ffconcat": b"ffconcat version 1.0\nfile copy.mkv\n",
        "ffconcat of all": b"ffconcat version 1.0\nfile /etc/passwd\n",
        "HLS": b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:8.0,\n/etc/passwd\n#EXT-X-ENDLIST\n",
        "HLS of a URL": b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:8.0,\nhttp://127.0.0.1:9/x.ts\n",
        "SDP": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n",
        "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "sound": b"RIFF$\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0\x40\x1f\0\0\x40\x1f\0\0\1\0\x08\0data\0\0\0\0",
        **spoiled,
        "spoiled by its end": good[: len(good) // 2],
    }


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def weights(good: bytes) -> dict[str, bytes]:
    """By kind, spoiled forms of a safetensors file."""
    [length] = struct.unpack("<Q", good[:8])
    header, data = json.loads(good[8 : 8 + length]), good[8 + length :]
    name = next(key for key in header if key != "__metadata__")

    def headed(text: bytes) -> bytes:
        return struct.pack("<Q", len(text)) + text + data

    def changed(**entry: Any) -> bytes:
        return headed(json.dumps(header | {name: header[name] | entry}).encode())

    begin, end = header[name]["data_offsets"]
    far = "language_model.model.layers.3000000000000.mlp.up_proj.weight"
    again = json.dumps({name: header[name]})[1:-1]
    return {
        "empty": b"",
        "cut": good[: len(good) // 2],
        "cut in its head": good[:20],
        "length beyond": struct.pack("<Q", 2**62) + good[8:],
        "length 0": struct.pack("<Q", 0) + good[8:],
        "no JSON": headed(b"x" * 100),
        "deep": headed(b"[" * 100_000),
        "list": headed(b"[]"),
        "a name twice": headed(json.dumps(header)[:-1].encode() + b", " + again.encode() + b"}"),
        "float offsets": changed(data_offsets=[float(begin), float(end)]),
        "offsets that overlap": changed(data_offsets=[begin + 2, end]),
        "offsets beyond": changed(data_offsets=[begin, 10**15]),
        "negative offsets": changed(data_offsets=[-end, begin]),
        "no offsets": headed(json.dumps(header | {name: {"dtype": "F32", "shape": [1]}}).encode()),
        "shape": changed(shape=[2**40, 2**40]),
        "negative shape": changed(shape=[-1, -1]),
        "shape of text": changed(shape=["a"]),
        "type": changed(dtype="F4"),
        "a layer far away": headed(
            json.dumps({(far if k == name else k): v for k, v in header.items()}).encode()
        ),
        "names with codes": headed(
            json.dumps({(k + "\x1b[31m" if k == name else k): v for k, v in header.items()}).encode()
        ),
        "surrogate": headed(
            json.dumps({("\ud800" if k == name else k): v for k, v in header.items()}).encode()
        ),
        "pickle": b"\x80\x04cos\nsystem\n(S'touch hit'\ntR.",
    }


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
PICKLES = {
    "empty": b"",
    "text": b"hello",
    "memo": b"\x80\x02h\x05.",
    "a call": b"\x80\x02cos\nsystem\n(S'touch hit'\ntR.",
    "a number for a tensor": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nK\x01\x85R.",
    "a number for pairs": b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.",
    "persistent": b"\x80\x02K\x01Q.",
    "pointer": POINTER,
    "page": b"<!DOCTYPE html><html>",
}
"""By kind, what may stand in a ``.bin`` file in the place of weights."""
_ENDLESS = "(([a-z_.0-9]+)+)+!"
ADAPTER: dict[str, Any] = {
    "target_modules": _ENDLESS,  # which the weights name
    "rank_pattern": {_ENDLESS: 4},
    "alpha_pattern": {_ENDLESS: 4},
    "modules_to_save": [_ENDLESS],
    "init_lora_weights": "pissa_niter_100000000",
    "r": 10_000_000,
    "lora_alpha": float("nan"),
    "base_model_name_or_path": ["pmod"],
    "alora_invocation_tokens": [1],
    "layer_replication": [[0, 10**8]],
    "peft_type": "XLORA",
}
"""By key, values with which PEFT would search, compute or allocate without end, or do what cannot be merged."""

MARKS: dict[str, bytes] = {
    "of all names": b'{"names": ["*"]}',
    "of a name": b'{"names": ["thesis.*", "checkpoint-*"]}',
    "of a file": b'{"files": ["thesis.txt", "thesis.md", "thesis.html"]}',
    "with digests": b'{"files": {"thesis.txt": "", "thesis.md": null, "thesis.html": "00"}}',
    "of a workspace": b'{"workspace": 1, "names": ["*"]}',
    "of nothing": b"a user's",
}
"""By kind, markers that a stranger wrote."""

TABLES: dict[str, dict[str, str]] = {
    "by its README": {"README.md": "---\nconfigs:\n- config_name: default\n  data_files: ../secret/*\n---\n"},
    "by an absolute name": {"README.md": "---\nconfigs:\n- config_name: a\n  data_files: /etc/passwd\n---\n"},
    "by a URL": {
        ".huggingface.yaml": "configs: [{config_name: a, data_files: 'hf://datasets/a/b/c.parquet'}]"
    },
    "with a README that is broken": {"README.md": "---\nconfigs: [\n---\n"},
    "by a saved state": {
        "state.json": '{"_data_files": [{"filename": "../secret/d.arrow"}]}',
        "dataset_info.json": "{}",
    },
    "by splits": {"dataset_dict.json": '{"splits": ["../secret"]}'},
    "with a deep state": {"state.json": "[" * 100_000},
    "by a link": {"d.parquet": "../secret/d.parquet"},
    "by a linked folder": {"data": "../secret"},
    "with a pipe": {"d.parquet": ""},
}
"""By kind, the files of a folder of data that leads to ``secret``, a link's target, or a pipe."""
RECORDS: dict[str, bytes] = {
    "with many turns": json.dumps(
        [{"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}] * 3000}]
    ).encode(),
    "with deep lists": b'[{"x": '
    + b"[" * 900
    + b"]" * 900
    + b', "conversations": [{"from": "human", "value": "Why?"}, '
    b'{"from": "gpt", "value": "So."}]}]',
}

RESULTS: dict[str, tuple[str, tuple[str | int, ...], Any]] = {
    "a batch of none": ("profile.json", ("result", "workload", "batch"), 0),
    "a batch of text": ("profile.json", ("result", "workload", "batch"), "<b>"),
    "a score that is NaN": ("results/results.json", ("tasks", 0, "model", "value"), float("nan")),
    "a score beyond reason": ("results/results.json", ("tasks", 0, "model", "value"), 1e308),
    "an error beyond reason": ("results/results.json", ("tasks", 0, "model", "stderr"), 1e308),
    "a surrogate for a task": ("results/results.json", ("tasks", 0, "name"), "\ud800"),
    "100,000 layers": ("tuned/config.json", ("mod", "retention_ratios"), [0.5] * 100_000),
    "ratios beyond 1": ("tuned/config.json", ("mod", "retention_ratios"), [-5, 7]),
}
"""By kind, a value of a results folder that only a figure, or other results beside it, would fail over."""

KINDS = ("pipe", "loop", "device", "folder", "gone")


def replace(path: str, kind: str) -> None:
    """Put something else than a regular file at a path."""
    Path(path).unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        Path(path).symlink_to(Path(path).name)
    elif kind == "device":
        Path(path).symlink_to("/dev/zero")
    elif kind == "folder":
        Path(path).mkdir()


def plant(links: dict[str, str]) -> None:
    """Put links, by place, to what is a user's."""
    for place, target in links.items():
        path = Path(place)
        path.parent.mkdir(exist_ok=True)
        if path.is_dir():
            path.rename("aside")
        path.unlink(missing_ok=True)
        path.symlink_to(target)


def place(path: str, kind: str) -> None:
    """`replace`, where nothing was."""
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).touch()
    replace(path, kind)


def table(kind: str) -> None:
    """Make a stranger's folder ``tab`` of `TABLES`, and a user's ``secret``."""
    import pyarrow as pa
    from pyarrow import parquet

    talk = json.dumps([{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}])
    for name in ("tab", "secret"):
        Path(name).mkdir()
    images = pa.array([None], pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    parquet.write_table(pa.table({"conversations": [talk], "image": images}), "secret/d.parquet")
    for name, content in TABLES[kind].items():
        if "pipe" in kind:
            os.mkfifo(f"tab/{name}")
        elif "link" in kind:
            Path("tab", name).symlink_to(content)
        else:
            Path("tab", name).write_text(content)


def write(path: str, content: bytes) -> None:
    """Give a file another content; the good one, which may be a link to it, stays."""
    Path(path).unlink(missing_ok=True)
    Path(path).write_bytes(content)


def set_all(path: str, key: str, value: Any) -> None:
    """Change a value in each record of a JSON list."""
    write(path, json.dumps([record | {key: value} for record in json.loads(Path(path).read_text())]).encode())


def set_value(path: str, keys: tuple[str | int, ...], value: Any) -> None:
    """Change one value of a JSON file, or of the first line of JSON Lines."""
    text = Path(path).read_text()
    first, rest = text.split("\n", 1) if path.endswith(".jsonl") else (text, "")
    data = inner = json.loads(first)
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    write(path, json.dumps(data).encode() + (b"\n" + rest.encode() if path.endswith(".jsonl") else b""))


def add_to_task(line: str, code: str) -> None:
    """Add a line to the task, which may name a function in ``u.py``."""
    task = Path("tasks/shapes.yaml")
    write(str(task), f"{task.read_text()}\n{line}\n".encode())
    write("tasks/u.py", code.encode())


def change_answer(key: str, value: Any) -> None:
    """Set a key of two evaluations' first samples, whose scores then differ."""
    for folder, score in (("before", 0.0), ("results", 1.0)):
        path = f"{folder}/samples/shapes.jsonl"
        set_value(path, (key,), value)
        set_value(path, ("model", "score"), score)


def inflate(path: str) -> None:
    """A file of 20 GB that takes no place on the disk."""
    write(path, b"")
    os.truncate(path, 20 * 2**30)


def keys_of(path: Path) -> list[tuple[str | int, ...]]:
    """Where the values of a JSON file are (or of its first line); of a list, in its first and last."""
    text = path.read_text()
    return list(_keys(json.loads(text.split("\n", 1)[0] if path.suffix == ".jsonl" else text), ()))


def _keys(data: Any, above: tuple[str | int, ...]) -> Iterator[tuple[str | int, ...]]:
    items: Any = data.items() if isinstance(data, dict) else ()
    if isinstance(data, list):
        items = [(place, data[place]) for place in sorted({0, len(data) - 1}) if data]
    for key, value in items:
        yield (*above, key)
        yield from _keys(value, (*above, key))
