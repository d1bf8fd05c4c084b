"""What there is to measure on a GPU, p-MoD against dense, in sections whose time limits add up to eight minutes.

Random bf16 weights of LLaVA-1.5-7B and LLaVA-NeXT-7B, made on the device; dense and p-MoD share them and alternate in
one process. Results are saved after each case; a second run with the same ``--output`` replaces the sections that
it measures. Run from a checkout, installed or not::

    python tests/benchmarks/gpu.py --output gpu.json                       every section but compile
    python tests/benchmarks/gpu.py --output gpu.json --sections cold,decode
    python tests/benchmarks/gpu.py --tables gpu.json                       the tables of docs/performance.md
    python tests/benchmarks/gpu.py --output tiny.json --tiny --device cpu  that the script works, in seconds

It needs torch, transformers, typer, rich, pydantic, numpy and safetensors, and no other package of pmod's.
"""

from __future__ import annotations

import argparse
import json
import sys
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

SECTIONS = {
    "cold": 60,
    "prefill": 75,
    "decode": 60,
    "static": 75,
    "throughput": 90,
    "train": 70,
    "kernels": 25,
    "trace": 25,
    "compile": 300,
}
"""In their order, the most telling first; after so many seconds the rest of a section's cases are skipped."""

OPTIONAL = {"compile"}


def without_registration() -> None:
    """Import pmod_cli without its hook, which needs wrapt and imports image processors, which need Pillow."""
    if "pmod_cli" in sys.modules:
        return
    stand_in = types.ModuleType("wrapt")
    stand_in.register_post_import_hook = lambda _hook, _name: None  # type: ignore[attr-defined]
    before = sys.modules.get("wrapt")
    sys.modules["wrapt"] = stand_in
    try:
        import pmod_cli  # noqa: F401
    finally:
        del sys.modules["wrapt"]
        if before is not None:
            sys.modules["wrapt"] = before


def sections_of(text: str) -> list[str]:
    """The sections of a comma-separated list, in the order in which they run."""
    names = text.split(",")
    if unknown := sorted(set(names) - set(SECTIONS)):
        raise argparse.ArgumentTypeError(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    return [name for name in SECTIONS if name in names]


def main(words: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = ",".join(name for name in SECTIONS if name not in OPTIONAL)
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    parser.add_argument(
        "--sections", type=sections_of, default=sections_of(default), help="separated by commas"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--limit", type=float, help="seconds for each section, instead of its own limit")
    parser.add_argument(
        "--tiny", action="store_true", help="tiny models: says nothing but that the script works"
    )
    parser.add_argument("--tables", type=Path, help="print the tables of a result, and measure nothing")
    options = parser.parse_args(words)
    if options.tables:
        from tests.benchmarks.gpu_bench.tables import tables

        print(tables(json.loads(options.tables.read_text(encoding="utf-8"))))
        return
    without_registration()
    from tests.benchmarks.gpu_bench.run import run

    limits = {name: SECTIONS[name] if options.limit is None else options.limit for name in options.sections}
    run(limits, options.output, options.device, options.tiny)


if __name__ == "__main__":
    main()
