"""The model card of a converted checkpoint: ``card.md``, filled in."""

from __future__ import annotations

import re
from pathlib import Path
from string import Template
from typing import Any

import yaml

from pmod_cli.families import Family
from pmod_cli.modeling.schedule import mean_retention
from pmod_cli.modeling.settings import MoDConfig
from pmod_cli.output.units import share
from pmod_cli.recipe import Recipe

_TEMPLATE = Path(__file__).with_name("card.md")


def model_card(
    family: Family, mod: MoDConfig, origin: dict[str, Any], recipe: Recipe | None, source_card: str | None
) -> str:
    """Contents of ``README.md``; the licence is that of the source's own card, if it has one.

    ``origin`` is the ``pmod`` section of the new ``config.json``.
    """
    source, revision = origin["source"], origin["revision"]
    title = source.rstrip("/").rpartition("/")[2]
    header: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["p-mod", "mixture-of-depths", "arxiv:2412.04449"],
        **({"base_model": source} if revision else {}),
        **{key: value for key, value in _front_matter(source_card).items() if key.startswith("license")},
    }
    settings = mod.to_dict() if recipe is None else recipe.model_dump(mode="json", exclude_none=True)
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        header=_yaml(header),
        title=title,
        where=f"[{source}](https://huggingface.co/{source}) at `{revision}`" if revision else f"`{title}`",
        command="calibrate" if "calibration" in origin else "convert",
        version=origin["version"],
        made_by=_made_by(origin, recipe),
        mod_layers=len(mod.mod_layers),
        layers=len(mod.retention_ratios),
        retention=share(mean_retention(mod.retention_ratios)),
        model_type=family.model_type,
        settings=_yaml(settings),
    )


def _made_by(origin: dict[str, Any], recipe: Recipe | None) -> str:
    if "calibration" in origin:
        return "what it measured"
    return f"recipe `{recipe.name}`" if recipe else "the routers and settings that it came with"


def _yaml(data: dict[str, Any]) -> str:
    return yaml.safe_dump(data, sort_keys=False).strip()


def _front_matter(card: str | None) -> dict[str, Any]:
    """The YAML at the top of a model card; empty if there is none or it cannot be read."""
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card or "", re.DOTALL)
    try:
        data = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        data = None
    return data if isinstance(data, dict) else {}
