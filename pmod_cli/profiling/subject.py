"""Finds what a user wants profiled: a checkpoint, a hub id, a ``config.json``, or the name of a recipe or geometry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pmod_cli.checkpoints.load import refuse_part
from pmod_cli.checkpoints.source import is_hub_id
from pmod_cli.families import check_decoder, dense_first, find_family, refuse_unfit
from pmod_cli.families.defaults import check_config, transformers_config
from pmod_cli.modeling.settings import MoDConfig
from pmod_cli.output.errors import PmodError, first_line
from pmod_cli.output.reading import read_json
from pmod_cli.profiling.geometry import Geometry, find_geometry, shipped_geometries
from pmod_cli.recipe import (
    Recipe,
    check_recipe,
    default_recipe,
    load_recipe,
    mod_config,
    nearest,
    shipped_recipes,
)


@dataclass(frozen=True)
class Variant:
    """One of the two models that are compared.

    Attributes:
        name: What it was made of: a path, hub id, recipe or geometry.
        raw: Contents of its dense ``config.json``: the dense model type, no ``mod`` section.
        mod: Retention ratios; None for the dense model.
        weights: Checkpoint folder or hub id; None if only a config is known.
        pictures: Settings of its image processor; empty if they are not known.
    """

    name: str
    raw: dict[str, Any]
    mod: MoDConfig | None
    weights: str | None
    pictures: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def config(self) -> Any:
        """The transformers config, of the dense class or of its p-MoD counterpart; a PmodError if it is refused."""
        routing = {"model_type": self.model_type, "mod": self.mod.to_dict()} if self.mod else {}
        return transformers_config(self.raw | routing)

    @property
    def model_type(self) -> str:
        """``model_type`` of its class."""
        family = find_family(self.raw["model_type"])
        return family.base_type if self.mod is None else family.model_type

    @cached_property
    def geometry(self) -> Geometry:
        """Its sizes; a PmodError if the vision tower is of a kind that cannot be counted, or a size is none."""
        try:
            return Geometry.from_config(self.raw, self.pictures)
        except (KeyError, TypeError, ValueError) as error:
            raise PmodError(f"{self.name}: config.json does not describe a model: {error}") from error


@dataclass(frozen=True)
class Subject:
    """What is profiled, by the user's name for it: a p-MoD model, its dense baseline, or one of them alone."""

    name: str
    pmod: Variant | None
    dense: Variant | None

    @property
    def variants(self) -> dict[str, Variant]:
        """Those there are, by ``pmod`` and ``dense``."""
        found = {"pmod": self.pmod, "dense": self.dense}
        return {role: variant for role, variant in found.items() if variant is not None}

    @property
    def main(self) -> Variant:
        """The p-MoD model, or the dense one if there is no other."""
        return next(iter(self.variants.values()))


def find_subject(
    model: str | None, *, recipe: str | None = None, overrides: Sequence[str] = (), baseline: str = "auto"
) -> Subject:
    """Find the p-MoD model and its dense baseline; of a hub id only the config is read.

    A dense MODEL becomes p-MoD by the recipe (the paper's settings if none is named): what ``pmod convert`` would
    make of it. A p-MoD MODEL's baseline is the same model with every layer dense.

    Args:
        model: Checkpoint folder, hub id, ``config.json``, or name of a recipe or geometry; None for the recipe's.
        recipe: Name or path of a recipe.
        overrides: ``key.sub=value`` for the recipe.
        baseline: ``auto``, ``none``, or another model to compare with, given like MODEL.

    Raises:
        PmodError: Nothing of that name, an unsupported model, or settings that do not fit it.
    """
    chosen = load_recipe(recipe, overrides) if recipe else None
    if model is not None:
        found = _read(model)
        if chosen is None and model in shipped_recipes() and not Path(model).exists():
            chosen = load_recipe(model, overrides)
    elif chosen is not None:
        found = _of_recipe(chosen, chosen.name)
    else:
        raise PmodError("nothing to profile", "name a MODEL or a --recipe")
    if found.mod is not None and (chosen or overrides):
        raise PmodError(
            f"{found.name} is p-MoD already", "a recipe or --set says how to convert a dense model"
        )
    dense, mod = replace(found, mod=None), found.mod
    if mod is None and baseline == "none":
        return Subject(found.name, None, dense)
    layers = dense.geometry.decoder.layers
    if mod is None:
        settings = chosen or default_recipe(overrides)
        family = find_family(dense.raw["model_type"])
        check_recipe(settings, family.name)
        check_decoder(family, dense.raw)
        mod = mod_config(settings, layers, dense_first(dense.raw))
    if len(mod.retention_ratios) != layers:
        raise PmodError(
            f"{found.name}: {len(mod.retention_ratios)} retention ratios for {layers} decoder layers"
        )
    if baseline not in ("auto", "none"):
        dense = _read(baseline)
        if dense.mod is not None:
            raise PmodError(f"baseline {baseline} is p-MoD too", "a baseline is dense")
    return Subject(found.name, replace(found, mod=mod), None if baseline == "none" else dense)


def _read(model: str) -> Variant:
    """A model by its path, name or hub id."""
    path = Path(model)
    if path.is_file():
        return _variant(model, _read_config(path), None)
    if path.is_dir():
        refuse_part(path)
        if not (path / "config.json").is_file():
            raise PmodError(f"{model} has no config.json", "give a checkpoint folder or a config.json")
        has_weights = any(path.glob("*.safetensors")) or any(path.glob("*.bin"))
        weights = model if has_weights else None
        return _variant(model, _read_config(path / "config.json"), weights, read_pictures(path))
    if model in shipped_recipes():
        return _of_recipe(load_recipe(model), model)
    if shipped := find_geometry(model):
        return _variant(model, shipped["config"], model if "/" in model else None, shipped.get("pictures"))
    offline = f"offline by name: {', '.join(shipped_geometries())}"
    if is_hub_id(model):
        from transformers import PreTrainedConfig

        try:
            raw = dict(PreTrainedConfig.get_config_dict(model)[0])
            return _variant(model, raw, model, _pictures_on_hub(model))
        except (OSError, ValueError) as error:
            reason = f"its config cannot be had from the hub: {first_line(error)}"
            raise PmodError(f"no folder {model}, and {reason}", offline) from error
    if path.suffix == ".json" or model.startswith((".", "/", "~")):
        raise PmodError(f"no file or folder {model}", "give a checkpoint folder, a config.json or a name")
    near = nearest(model, [*shipped_geometries(), *shipped_recipes()])
    raise PmodError(f"nothing to profile at {model!r}", f"did you mean {near}?" if near else offline)


def _read_config(path: Path) -> dict[str, Any]:
    data = read_json(path)
    if "model_type" not in data:
        raise PmodError(f"{path} is not a model's config.json", "it has no model_type")
    return data


def read_pictures(folder: Path) -> dict[str, Any]:
    """Settings of the image processor in a checkpoint folder; empty if there is none."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            whole = read_json(folder / name)
            found = whole.get("image_processor") or (whole if name.startswith("pre") else None)
            if isinstance(found, dict):
                return found
    return {}


def _pictures_on_hub(model: str) -> dict[str, Any]:
    """As `read_pictures`, of a hub id."""
    from transformers import ImageProcessingMixin

    try:
        return dict(ImageProcessingMixin.get_image_processor_dict(model)[0])
    except (OSError, ValueError):
        return {}


def _of_recipe(recipe: Recipe, name: str) -> Variant:
    """The dense model that a recipe is for, without weights."""
    for model in (recipe.config, recipe.source, recipe.name):
        if isinstance(model, str) and (found := find_geometry(model)):
            return _variant(name, found["config"], None, found.get("pictures"))
    if isinstance(recipe.source, str) and recipe.config is None:
        return replace(_read(recipe.source), name=name, weights=None)
    raise PmodError(
        f"recipe {recipe.name} does not say which geometry it is for",
        f"name a MODEL, or set config: to one of {', '.join(shipped_geometries())}",
    )


def _variant(
    name: str, raw: dict[str, Any], weights: str | None, pictures: dict[str, Any] | None = None
) -> Variant:
    """Of either kind of config."""
    refuse_unfit(raw.get("model_type"))
    check_config(raw)
    family = find_family(raw["model_type"])
    dense = {key: value for key, value in raw.items() if key != "mod"} | {"model_type": family.base_type}
    if raw["model_type"] == family.base_type:
        return Variant(name, dense, None, weights, pictures or {})
    try:
        return Variant(name, dense, MoDConfig.from_dict(raw.get("mod") or {}), weights, pictures or {})
    except (TypeError, ValueError) as error:
        raise PmodError(f"{name}: bad mod section in config.json: {error}") from error
