"""What changed between two saved profiles."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pmod_cli.output import units
from pmod_cli.output.errors import PmodError
from pmod_cli.output.files import read_json
from pmod_cli.output.tables import Table


def compare_files(before: Path, after: Path) -> dict[str, Any]:
    """Compare the output of two ``pmod profile --json`` runs.

    Returns:
        ``before`` and ``after`` (the files) and ``changes``: for each figure that differs ``key``, ``before``,
        ``after`` and, for numbers, ``ratio``.

    Raises:
        PmodError: A file that is not such output.
    """
    old, new = _figures(before), _figures(after)
    changes = []
    for key in dict.fromkeys([*old, *new]):
        first, second = old.get(key), new.get(key)
        if first != second:
            numbers = all(type(value) in (int, float) for value in (first, second))
            ratio = second / first if numbers and first else None
            changes.append({"key": key, "before": first, "after": second, "ratio": ratio})
    return {"before": str(before), "after": str(after), "changes": changes}


def changes_table(comparison: dict[str, Any]) -> Table:
    """What `compare_files` found, as a table."""
    rows: list[list[str]] = [
        [
            change["key"].replace(".parts", "").replace(".macs", " MACs"),
            _show(change["before"]),
            _show(change["after"]),
            "-" if change["ratio"] is None else f"{change['ratio']:.1%}",
        ]
        for change in comparison["changes"]
        if not change["key"].endswith(".flops")  # twice the MACs
    ]
    title = f"{comparison['before']} -> {comparison['after']}: {len(rows)} figures changed"
    return Table(title, ["figure", "before", "after", "ratio"], rows)


def _figures(path: Path) -> dict[str, Any]:
    document = read_json(path)
    result = document.get("result")
    if not isinstance(result, dict) or document.get("command") != "profile":
        raise PmodError(f"{path} is not the output of pmod profile --json")
    return dict(_flatten("", result))


def _flatten(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(f"{prefix}.{key}" if prefix else key, inner)
    elif isinstance(value, list):
        # A list is compared as one figure, layers as their number; which layer changed shows in the sums.
        yield prefix, len(value) if value and isinstance(value[0], dict) else value
    else:
        yield prefix, value


def _show(value: Any) -> str:
    if isinstance(value, int) and abs(value) >= 10_000:
        return units.si(value)
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 24 else f"{text[:21]}..."
