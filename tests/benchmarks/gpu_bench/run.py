"""Runs sections within their time, and saves after each case."""

from __future__ import annotations

import datetime
import platform
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from pmod_cli import __version__
from pmod_cli.devices import find_device
from pmod_cli.output.errors import PmodError, first_line
from pmod_cli.output.files import tag, write_json
from pmod_cli.output.reading import read_json
from tests.benchmarks.gpu_bench.models import Session
from tests.benchmarks.gpu_bench.sections import CASES, Case


def run(limits: dict[str, float], output: Path, device: str, tiny: bool) -> dict[str, Any]:
    """Measure sections and write the result.

    Args:
        limits: Seconds by section, in the order in which they run.
        output: A JSON file; the sections that it has from the same machine stay.
        device: ``cuda`` or ``cpu``.
        tiny: Whether to take tiny models.

    Returns:
        What the file has: ``schema_version``, ``command``, ``machine``, ``sections`` (see `run_section`).
    """
    try:
        target = find_device(device)
        machine = describe(target, tiny)
        result: dict[str, Any] = read_json(output) if output.exists() else tag("benchmark") | {"sections": {}}
        if result.setdefault("machine", machine) != machine:
            raise PmodError(f"{output} is of another machine or other versions", "give another --output")
    except PmodError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    session = Session(target, tiny)
    for name, limit in limits.items():
        print(f"{name}:", file=sys.stderr)
        for section in run_section(CASES[name](session), limit):
            result["sections"][name] = section
            write_json(output, result)
    print(f"saved to {output}", file=sys.stderr)
    return result


def run_section(cases: Iterable[Case], limit: float) -> Iterator[dict[str, Any]]:
    """Run cases until the time is over; a case that fails does not end the others.

    Yields:
        After each case ``date`` (UTC), ``seconds``, ``limit``, ``cases`` (each with ``case`` and its result, or
        ``error``), and ``skipped``, the cases for which no time was left.
    """
    start = time.monotonic()
    done: list[dict[str, Any]] = []
    skipped: list[str] = []
    for name, case in cases:
        began = time.monotonic()
        if began - start >= limit:
            skipped.append(name)
        else:
            try:
                result = case()
            except Exception as error:  # whatever it is, the time on the machine is not lost
                result = {"error": f"{type(error).__name__}: {first_line(error)}"}
            done.append({"case": name, **result, "took": time.monotonic() - began})
            print(f"  {name}: {result.get('error', '')}{done[-1]['took']:.1f} s", file=sys.stderr)
        yield {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "seconds": time.monotonic() - start,
            "limit": limit,
            "cases": done,
            "skipped": skipped,
        }


def describe(device: torch.device, tiny: bool) -> dict[str, Any]:
    """What the numbers depend on."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads",
        "memory_gb": torch.cuda.get_device_properties(device).total_memory / 1e9 if cuda else None,
        "pmod": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "dtype": "bfloat16",
        "models": "tiny" if tiny else "LLaVA-1.5-7B and LLaVA-NeXT-7B, random weights",
    }
