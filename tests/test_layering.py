"""The rooms of the package import only from below, and docs/architecture.md draws the imports as they are."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest

import pmod_cli

ROOT = Path(__file__).parents[1]
LAYERS = (
    {"cli"},
    {"demo"},
    {"report", "doctor", "calibration"},
    {"visualize", "evaluation", "training", "conversion", "profiling", "serving"},
    {"generation", "data"},
    {"prompts", "stopping"},
    {"plots", "kernels"},
    {"recipe", "checkpoints", "devices", "published"},
    {"families"},
    {"videos"},
    {"modeling", "extras", "pictures"},
)
"""From the top; a room may import those of lower layers."""

WITHIN_A_LAYER = {("conversion", "profiling")}


def arrows() -> set[tuple[str, str]]:
    """Pairs of a room and a room that it imports, at the top of a module or inside a function."""
    found = set()
    for path in (ROOT / "pmod_cli").rglob("*.py"):
        room = path.relative_to(ROOT / "pmod_cli").parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                package = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
                module = ".".join([*package, *filter(None, [node.module])])
                names = [f"{module}.{alias.name}" for alias in node.names]
            found |= {(room, name.split(".")[1]) for name in names if name.startswith("pmod_cli.")}
    return {(above, below) for above, below in found if above != below and "__" not in above + below}


def test_imports_point_down():
    level = {room: number for number, layer in enumerate(LAYERS) for room in layer}
    wrong = []
    for above, below in arrows():
        if below == "output":
            legal = above != "modeling"
        else:
            legal = above != "output" and (level[above] < level[below] or (above, below) in WITHIN_A_LAYER)
        if not legal:
            wrong.append(f"{above} -> {below}")
    assert not wrong


def test_the_documentation_draws_the_imports():
    """All arrows but those to ``output``, which any room but ``modeling`` may have."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawn = {
        (above, below)
        for above, rooms in re.findall(r"^ *(\w+) --> (.+)$", page, re.MULTILINE)
        for below in rooms.split(" & ")
    }
    found = {(above, below) for above, below in arrows() if below != "output"}
    lines = {
        above: f"  {above} --> {' & '.join(sorted(below for a, below in found if a == above))}"
        for above, _ in sorted(found)
    }
    assert drawn == found, "the arrows of docs/architecture.md should be:\n" + "\n".join(lines.values())
    rooms = {room for layer in LAYERS for room in layer} | {"output"}
    assert rooms == set(re.findall(r"^- `(\w+)`:", page, re.MULTILINE)), "one line for each room"


@pytest.mark.parametrize("old", sorted(pmod_cli._MOVED))
def test_modules_that_moved_can_be_imported_under_their_old_names(old):
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} is now"):
        module = importlib.import_module(old)
    assert module is importlib.import_module(pmod_cli._MOVED[old])
