"""What changed between two saved profiles."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pmod_cli.output.errors import PmodError
from pmod_cli.output.files import read_json


def compare_files(before: Path, after: Path) -> dict[str, Any]:
    """Compare the output of two ``pmod profile --json`` runs.

    Args:
        before: File of the first.
        after: File of the second.

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
            ratio = second / first if _is_number(first) and _is_number(second) and first else None
            changes.append({"key": key, "before": first, "after": second, "ratio": ratio})
    return {"before": str(before), "after": str(after), "changes": changes}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _figures(path: Path) -> dict[str, Any]:
    document = read_json(path)
    result = document.get("result")
    if not isinstance(result, dict) or document.get("command") != "profile":
        raise PmodError(f"{path} is not the output of pmod profile --json")
    return dict(_flatten(result))


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else key)
    elif isinstance(value, list):
        # A list is compared as one figure, layers as their number; which layer changed shows in the sums.
        yield prefix, len(value) if value and isinstance(value[0], dict) else value
    else:
        yield prefix, value
