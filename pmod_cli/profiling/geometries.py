"""Shipped geometries: what ``config.json`` of well-known checkpoints says, so that they are profiled offline."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent / "geometries"


@cache
def _load() -> dict[str, dict[str, Any]]:
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(_FOLDER.glob("*.json"))
    }


def shipped_geometries() -> list[str]:
    """Names of the shipped geometries, sorted."""
    return list(_load())


def find_geometry(name_or_hub_id: str) -> dict[str, Any] | None:
    """The config of a shipped geometry as a plain dict, by its name or by the hub id that it describes."""
    for name, entry in _load().items():
        if name_or_hub_id in (name, *entry["hub_ids"]):
            return dict(entry["config"])
    return None
