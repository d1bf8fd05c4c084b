"""Options that a call would ignore are refused: whoever gives one expects something of it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import MISSING, fields
from typing import Any

from pmod_cli.output.errors import PmodError

_SPELLED = {"as_json": "--json", "minimum": "--min", "overrides": "--set", "model": "MODEL"}


def refuse_ignored(options: Any, call: str, used: Collection[str]) -> None:
    """Refuse fields of a command's dataclass that have another value than their default, but for those ``used``."""
    for field in fields(options):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if field.name not in used and getattr(options, field.name) != default:
            name = _SPELLED.get(field.name, f"--{field.name.replace('_', '-')}")
            raise PmodError(f"{name} says nothing about {call}", "leave it out")
