"""What changed between two saved profiles."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    figures = []
    for path in (before, after):
        document = read_json(path)
        result = document.get("result")
        if not isinstance(result, dict) or document.get("command") != "profile":
            raise PmodError(f"{path} is not the output of pmod profile --json")
        figures.append(dict(_flatten("", result)))
    changes = []
    for key in figures[0] | figures[1]:
        old, new = (side.get(key) for side in figures)
        numbers = {type(old), type(new)} <= {int, float}
        if old != new:
            ratio = new / old if numbers and old else None
            changes.append({"key": key, "before": old, "after": new, "ratio": ratio})
    return {"before": str(before), "after": str(after), "changes": changes}


def _flatten(prefix: str, value: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _flatten(f"{prefix}{key}.", inner)
        else:
            # A list is compared as one figure, layers as their number; which layer changed shows in the sums.
            layers = isinstance(inner, list) and inner and isinstance(inner[0], dict)
            yield f"{prefix}{key}", len(inner) if layers else inner


def changes_table(comparison: dict[str, Any]) -> Table:
    """What `compare_files` found, as a table."""
    rows = [
        [
            change["key"],
            *(
                f"{v:.4g}" if isinstance(v, float) else f"{v}"[:24]
                for v in (change["before"], change["after"])
            ),
            "-" if change["ratio"] is None else f"{change['ratio']:.1%}",
        ]
        for change in comparison["changes"]
        if not change["key"].endswith(".flops")  # twice the MACs
    ]
    title = f"{comparison['before']} -> {comparison['after']}: {len(rows)} figures changed"
    return Table(title, ["figure", "before", "after", "ratio"], rows)
