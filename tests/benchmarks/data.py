"""Time and memory of training data: ``data check``, and what ``finetune`` does before its first step; not a test.

python tests/benchmarks/data.py --work FOLDER                        this checkout
python tests/benchmarks/data.py --work FOLDER --against CHECKOUT     another one and this, alternating
python tests/benchmarks/data.py --work FOLDER --large 0              without the large file
python tests/benchmarks/data.py --work FOLDER --tiny                 whether the script works

Inputs are made up like LLaVA's mix (1.25 kB of JSON a record, 94 in 100 with a picture) and stay in FOLDER. Each
measurement is a process of its own; imports are not counted. ``check`` has as many pictures of 640 x 480 as records,
``model`` has 400 and the demo's processor, ``start`` has ``--large`` records on the pictures of ``check``: two
processes at once run ``finetune`` with the demo's model up to the end of the first step. ``first`` also makes the
table, where the checkout has one. Memory of the data is what a process has more than with 64 records: its own pages,
and its share of those that both map.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TEXT = (
    "the a of picture shows person man woman dog cat car street red blue green left right top near table holding "
    "standing next building tree sky water food plate with and in on is are what color how many where why describe "
    "detail image object large small white black background wearing shirt looking room kitchen bus train sign text"
)
FEW = 64


def main(arguments: list[str] | None = None) -> None:
    """Make the inputs, measure, print a table; with ``--json`` the numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for inputs, cache and outputs")
    parser.add_argument("--against", type=Path, help="another checkout, to be measured in turn with this one")
    parser.add_argument("--records", type=int, default=20_000, help="of check and model")
    parser.add_argument("--large", type=int, default=665_000, help="records of start; 0 leaves it out")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a few records, in this process")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if options.worker:
        print(json.dumps(WORKERS[options.worker[0]](work, *options.worker[1:])), flush=True)
        return
    if options.tiny:
        options.records, options.large, options.repeats = 30, 90, 1
    os.environ["PMOD_CACHE"] = str(work / "cache")
    make_inputs(work, options.records, options.large)
    checkouts = {"this": ROOT} | ({"other": options.against.resolve()} if options.against else {})
    results: dict[str, Any] = {name: {"check": [], "model": [], "start": []} for name in checkouts}
    for _ in range(options.repeats):
        for kind in ("check", "model"):
            for name, checkout in reversed(checkouts.items()):
                results[name][kind] += measure(work, checkout, [[kind]], options.tiny)
    if options.large:
        for name, checkout in reversed(checkouts.items()):
            shutil.rmtree(work / "cache", ignore_errors=True)
            results[name]["first"] = measure(work, checkout, [["start", "large.json"]], options.tiny)
        for _ in range(options.repeats):
            for name, checkout in reversed(checkouts.items()):
                pair = {
                    size: measure(
                        work, checkout, [["start", f"{size}.json", str(k)] for k in (1, 2)], options.tiny
                    )
                    for size in ("few", "large")
                }
                results[name]["start"].append(pair)
    document = {
        "command": f"data.py --records {options.records} --large {options.large} --repeats {options.repeats}",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "results": results,
    }
    print(json.dumps(document) if options.json else table(document))


def table(document: dict[str, Any]) -> str:
    """The medians, and the other checkout's over this one's."""
    rows = {name: _medians(found) for name, found in document["results"].items()}
    lines = [document["command"], document["machine"]]
    for key, value in rows["this"].items():
        other = rows.get("other", {}).get(key)
        against = (
            f"   other {other:10.2f}   other / this {other / value if value else 0:6.2f}" if other else ""
        )
        lines.append(f"{key:42} {value:10.2f}{against}")
    return "\n".join(lines)


def _medians(found: dict[str, Any]) -> dict[str, float]:
    medians = {}
    for kind in ("check", "model"):
        for key in ("seconds", "cpu"):
            medians[f"{kind}: {key}"] = statistics.median(row[key] for row in found[kind])
    if found["start"]:
        medians["start: first, seconds"] = found["first"][0]["seconds"]
        medians["start: first, most memory, MB"] = found["first"][0]["peak"] / 1e6
        for key, unit in (
            ("seconds", "seconds"),
            ("own", "own memory of the data, MB"),
            ("share", "with share, MB"),
        ):
            scale = 1 if key == "seconds" else 1e6
            means = {
                size: [statistics.mean(row[key] for row in pair[size]) / scale for pair in found["start"]]
                for size in ("few", "large")
            }
            more = statistics.median(means["large"]) - statistics.median(means["few"])
            if key == "seconds":
                medians["start: seconds"] = statistics.median(means["large"])
            medians[f"start: {'seconds more than with 64 records' if key == 'seconds' else unit}"] = more
    return medians


def make_inputs(work: Path, records: int, large: int) -> None:
    """Pictures and data files; those that are there are taken."""
    few = min(400, records)
    for name, count in (("check", records), ("model", few)):
        make_pictures(work / f"pictures-{name}", count)
        write_records(work / f"{name}.json", records, count)
    if large:
        write_records(work / "large.json", large, records)
        write_records(work / "few.json", FEW, records)


def write_records(path: Path, count: int, pictures: int) -> None:
    """A file like LLaVA's mixes."""
    stamp = path.with_suffix(f".{count}-{pictures}")
    if stamp.exists():
        return
    with path.open("w", encoding="utf-8") as file:
        for index, record in enumerate(made_up(count, pictures)):
            file.write((",\n" if index else "[\n") + json.dumps(record))
        file.write("\n]\n")
    stamp.touch()


def made_up(count: int, pictures: int) -> Iterator[dict[str, Any]]:
    """Records; the same each time."""
    draw, words = random.Random(0), TEXT.split()
    for index in range(count):
        rounds = draw.choices((1, 2, 3, 5, 8), (40, 20, 20, 15, 5))[0]
        with_picture = draw.random() < 0.94
        lengths = (5, 20, 60, 120, 250) if rounds < 3 else (5, 20, 60, 80)
        turns = []
        for number in range(rounds):
            question = " ".join(draw.choices(words, k=draw.randint(5, 20))) + "?"
            answer = " ".join(draw.choices(words, k=draw.choice(lengths))) + "."
            start = "<image>\n" if with_picture and not number else ""
            turns += [{"from": "human", "value": start + question}, {"from": "gpt", "value": answer}]
        image = {"image": f"coco/train2017/{index % pictures:012d}.jpg"} if with_picture else {}
        yield {"id": f"{index:012d}", **image, "conversations": turns}


def make_pictures(folder: Path, count: int) -> None:
    """Different JPEGs of 640 x 480 below a folder."""
    import numpy as np
    from PIL import Image

    folder = folder / "coco/train2017"
    if folder.is_dir() and sum(1 for _ in folder.iterdir()) == count:
        return
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    patches = Image.fromarray(draw.integers(0, 256, (100, 120, 3), dtype=np.uint8))
    scene = np.asarray(patches.resize((1920, 1600), Image.Resampling.BICUBIC)).astype(np.int16)
    scene = np.clip(scene + draw.normal(0, 8, scene.shape).astype(np.int16), 0, 255).astype(np.uint8)
    for index in range(count):
        top, left = draw.integers(0, 1600 - 480), draw.integers(0, 1920 - 640)
        part = Image.fromarray(scene[top : top + 480, left : left + 640])
        part.save(folder / f"{index:012d}.jpg", quality=75)


def measure(work: Path, checkout: Path, jobs: list[list[str]], here: bool) -> list[dict[str, Any]]:
    """Run workers of a checkout at the same time; each holds its memory until all have looked at theirs."""
    if here:
        return [WORKERS[kind](work, *words, hold=False) for kind, *words in jobs]
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--work", str(work), "--worker"]
    processes = [
        subprocess.Popen(
            [*command, *job],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=work,
        )
        for job in jobs
    ]
    rows = []
    for _ in range(2 if jobs[0][0] == "start" else 0):  # ready; looked
        for process in processes:
            if process.stdout is None or process.stdout.readline() != "here\n":
                raise SystemExit(f"{jobs} failed in {checkout}")
        for process in processes:
            if process.stdin is not None:
                process.stdin.write("on\n")
                process.stdin.flush()
    for process in processes:
        out, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"{jobs} failed in {checkout}")
        rows.append(json.loads(out.splitlines()[-1]))
    return rows


def check_worker(work: Path, hold: bool = True, model: bool = False) -> dict[str, Any]:
    """Seconds of ``data check``, wall clock and processor."""
    from pmod_cli.data.check import check_data

    processor = None
    if model:
        from pmod_cli.demo.job import BASELINE
        from pmod_cli.recipe import default_recipe
        from pmod_cli.training.model import load_processor

        processor = load_processor(BASELINE, default_recipe().train)
    kind = "model" if model else "check"
    began, used = time.perf_counter(), time.process_time()
    report = check_data(work / f"{kind}.json", work / f"pictures-{kind}", processor=processor)
    seconds, cpu = time.perf_counter() - began, time.process_time() - used
    assert report["good"] == report["records"], report["counts"]
    return {"seconds": seconds, "cpu": cpu, "peak": _peak()}


def model_worker(work: Path, hold: bool = True) -> dict[str, Any]:
    """The same with a processor."""
    return check_worker(work, hold, model=True)


def start_worker(work: Path, data: str, number: str = "1", hold: bool = True) -> dict[str, Any]:
    """Seconds that ``finetune`` takes up to the end of its first step, and this process's memory then."""
    from pmod_cli.demo.job import BASELINE
    from pmod_cli.recipe import default_recipe
    from pmod_cli.training.finetune import finetune

    output = work / f"tuned-{number}"
    train = {
        "max_steps": 2,
        "global_batch_size": 2,
        "micro_batch_size": 2,
        "group_by_modality_length": True,
        "save_steps": 10**9,
    }
    recipe = default_recipe()
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=train)})
    found: dict[str, Any] = {}
    began, used = time.perf_counter(), time.process_time()

    def after_step(*_: Any) -> None:
        found.update(seconds=time.perf_counter() - began, cpu=time.process_time() - used)
        _meet(hold)
        found.update(_memory())
        _meet(hold)
        raise _Enough

    with contextlib.suppress(_Enough):
        finetune(
            BASELINE,
            work / data,
            work / "pictures-check",
            output,
            recipe=recipe,
            force=True,
            progress=after_step,
        )
    shutil.rmtree(output.with_name(f"{output.name}.training"), ignore_errors=True)
    return found | {"peak": _peak()}


class _Enough(Exception):
    pass


def _meet(hold: bool) -> None:
    """Wait until all workers are here."""
    if hold:
        print("here", flush=True)
        sys.stdin.readline()


def _memory() -> dict[str, int]:
    """Bytes of this process that no other maps, and these with its share of what others map as well."""
    sizes: dict[str, int] = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        key, size, *_ = line.split()
        sizes[key.rstrip(":")] = int(size) * 1024
    return {"own": sizes["Private_Clean"] + sizes["Private_Dirty"], "share": sizes["Pss"]}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


WORKERS: dict[str, Any] = {"check": check_worker, "model": model_worker, "start": start_worker}

if __name__ == "__main__":
    main()
