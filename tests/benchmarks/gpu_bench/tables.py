"""A result as the Markdown tables of docs/performance.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Row = list[str]
Entry = dict[str, Any]
HEADS = {
    "cold": ["", "dense", "p-MoD", "ratio"],
    "prefill": ["warm prefill", "dense (device busy)", "p-MoD (device busy)", "ratio", "FLOPs ratio"],
    "decode": ["decode, per token", "dense", "p-MoD", "ratio", "ratio, lengths seen before"],
    "static": ["decode with a static cache", "per token", "first call, compiling"],
    "throughput": ["`generate`", "dense", "p-MoD", "ratio"],
    "train": ["forward and backward", "dense", "p-MoD", "ratio"],
    "kernels": ["kernel", "fused", "PyTorch", "ratio"],
    "trace": ["", "dense", "p-MoD", "ratio"],
    "compile": ["`torch.compile`", "dense", "p-MoD", "ratio"],
}


def tables(result: Entry) -> str:
    """One table per section, with what was skipped or failed below it."""
    machine = result["machine"]
    blocks = [
        f"Measured on {machine['device']} with torch {machine['torch']}, transformers {machine['transformers']}, "
        f"{machine['dtype']}; {machine['models']}."
    ]
    for name, section in result["sections"].items():
        rows: list[Row] = []
        remarks = (
            [f"skipped, the time was over: {', '.join(section['skipped'])}"] if section["skipped"] else []
        )
        for case in section["cases"]:
            if "error" in case or "note" in case:
                remarks.append(f"{case['case']}: {case.get('error') or case['note']}")
            else:
                rows += ROWS[name](case)
        lines = [f"**{name}** ({section['date'][:10]}, {section['seconds']:.0f} s)", ""]
        if rows:
            head = HEADS[name]
            lines += [line(head), line(["---"] + ["---:"] * (len(head) - 1)), *map(line, rows), ""]
        blocks.append("\n".join([*lines, *(f"- {remark}" for remark in remarks)]).rstrip())
    return "\n\n".join(blocks)


def line(cells: Row) -> str:
    """One line of a table."""
    return "| " + " | ".join(cells) + " |"


def number(value: float | None, unit: str = "") -> str:
    """Three figures, or a dash where nothing was measured."""
    if value is None:
        return "-"
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f}{unit}"


def values(case: Entry, key: str, unit: str) -> Row:
    """Dense, p-MoD and their ratio."""
    sides = [number((case[role] or {}).get(key), unit) for role in ("dense", "pmod")]
    return [*sides, number(case["ratio"].get(key))]


def _cold(case: Entry) -> list[Row]:
    names = {
        "prefill_ms": "prefill of a length not seen before",
        "prefill_again_ms": "the same prompts again",
        "decode_ms": "decode after them, per token",
        "decode_again_ms": "the same again, per token",
    }
    return [
        [f"{name}, {case['case'].split(',')[0]}", *values(case, key, " ms")] for key, name in names.items()
    ]


def _prefill(case: Entry) -> list[Row]:
    dense, pmod, ratio = values(case, "ms", " ms")
    busy = [number((case[role] or {}).get("busy_ms")) for role in ("dense", "pmod")]
    return [[case["case"], f"{dense} ({busy[0]})", f"{pmod} ({busy[1]})", ratio, number(case["flops_ratio"])]]


def _decode(case: Entry) -> list[Row]:
    again = number(case["ratio"].get("ms_per_token_again"))
    return [[case["case"], *values(case, "ms_per_token", " ms"), again]]


def _static(case: Entry) -> list[Row]:
    return [[case["case"], number(case["ms_per_token"], " ms"), number(case["first_seconds"], " s")]]


def _throughput(case: Entry) -> list[Row]:
    sides = []
    for role in ("dense", "pmod"):
        measured = case[role]
        memory = f", {number(measured['peak_gb'])} GB" if measured and measured["peak_gb"] else ""
        lost = any(name.startswith(role) for name in case["out_of_memory"])
        missing = "out of memory" if lost else "-"
        sides.append(number(measured["tokens_per_second"], " tokens/s") + memory if measured else missing)
    return [[case["case"], *sides, number(case["ratio"].get("tokens_per_second"))]]


def _train(case: Entry) -> list[Row]:
    return [[case["case"], *values(case, "ms", " ms")]]


def _kernels(case: Entry) -> list[Row]:
    fused, plain = case["kernel_us"], case.get("reference_us")
    return [
        [case["case"], number(fused, " µs"), number(plain, " µs"), number(fused / plain if plain else None)]
    ]


def _trace(case: Entry) -> list[Row]:
    rows = []
    for phase in ("prefill", "decode_step"):
        dense, pmod = case["dense"][phase], case["pmod"][phase]
        name = f"{case['case']}: {phase.replace('_', ' ')}"
        counts = dense["operations"], pmod["operations"]
        rows.append([f"{name}, device operations", *map(str, counts), number(counts[1] / max(counts[0], 1))])
        waits = [str(sum(side["waits"].values())) for side in (dense, pmod)]
        rows.append([f"{name}, calls that wait", *waits, "-"])
    return rows


def _compile(case: Entry) -> list[Row]:
    first = [number(case["first_seconds"].get(role), " s") for role in ("dense", "pmod")]
    return [
        ["first prompt and tokens", *first, "-"],
        ["prefill", *values(case, "prefill_ms", " ms")],
        ["decode, per token", *values(case, "decode_ms", " ms")],
    ]


ROWS: dict[str, Callable[[Entry], list[Row]]] = {
    "cold": _cold,
    "prefill": _prefill,
    "decode": _decode,
    "static": _static,
    "throughput": _throughput,
    "train": _train,
    "kernels": _kernels,
    "trace": _trace,
    "compile": _compile,
}
