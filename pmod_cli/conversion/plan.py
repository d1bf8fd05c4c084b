"""What a conversion will do, found out from headers and configs alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pmod_cli import __version__
from pmod_cli.checkpoints.load import refuse_part
from pmod_cli.checkpoints.shards import INDEX, StoredTensor, shard_bytes
from pmod_cli.checkpoints.source import Source, open_source
from pmod_cli.conversion.card import model_card
from pmod_cli.conversion.decoder import DecoderLayout, find_decoder, router_tensors
from pmod_cli.conversion.formats import FORMATS, Options, Shard, Translation, find_format
from pmod_cli.conversion.restore import baseline_files, index_of
from pmod_cli.conversion.shapes import check_processor, check_shapes
from pmod_cli.families import Family, check_decoder, dense_first, find_family
from pmod_cli.modeling.schedule import mean_retention
from pmod_cli.modeling.settings import MoDConfig
from pmod_cli.output.errors import PmodError
from pmod_cli.output.files import to_json
from pmod_cli.output.paths import public_name
from pmod_cli.recipe import Recipe, check_recipe, default_recipe, mod_config

ROUTERS = "model-routers.safetensors"
"""The file of the routers."""


@dataclass(frozen=True)
class Plan:
    """What a conversion will do, known from headers and configs alone.

    Attributes:
        format: Name of the source's format.
        translation: The dense checkpoint that it is.
        recipe: What is followed; None if the source brings its own settings.
        mod: Mixture-of-Depths settings, one ratio per layer.
        calibration: What ``config.json`` says of the calibration that gave routers and ratios; None without one.
        proof: Of a family that is not listed: what its classes were made of and what was found equal.
    """

    source: Source
    format: str
    family: Family
    translation: Translation = field(repr=False)
    recipe: Recipe | None
    mod: MoDConfig
    layout: DecoderLayout
    routers: list[StoredTensor] = field(repr=False)
    calibration: dict[str, Any] | None = None
    proof: dict[str, Any] | None = None

    @property
    def weight_bytes(self) -> int:
        """Size of the baseline's weights."""
        return sum(shard_bytes(shard.tensors) for shard in self.translation.shards)

    def description(self, destination: Path | None) -> dict[str, Any]:
        """What the results of a conversion and of a dry run begin with."""
        return {
            "source": self.source.name,
            "destination": str(destination) if destination else None,
            "format": self.format,
            "family": self.family.name,
            "recipe": self.recipe.name if self.recipe else None,
            "layers": layer_table(self.mod),
            "mean_retention": mean_retention(self.mod.retention_ratios),
            "router_parameters": sum(math.prod(tensor.shape) for tensor in self.routers),
            "weight_bytes": self.weight_bytes,
        }

    def checkpoint(self) -> Translation:
        """Everything that is written: the translation with routers, config, index, card and the way back."""
        recipe, dense = self.recipe, self.translation
        # transformers keeps this section through fine-tuning.
        origin = {
            "version": __version__,
            "source": self.source.name if self.source.revision else public_name(self.source.name),
            "revision": self.source.revision,
            "format": self.format,
            "recipe": {"name": recipe.name, "mod": recipe.mod.model_dump(mode="json")} if recipe else None,
            **({"calibration": self.calibration} if self.calibration else {}),
        }
        if self.proof is not None:
            origin["any"] = self.proof
        # auto_map names code of the source's repository, which is not run for our model types.
        config = {
            **{key: value for key, value in dense.config.items() if key != "auto_map"},
            "architectures": [self.family.architecture],
            "model_type": self.family.model_type,
            "mod": self.mod.to_dict(),
            "pmod": origin,
        }
        shards = [*dense.shards, Shard(ROUTERS, self.routers)]
        card = dense.originals.get("README.md")
        own_card = card.read_text(encoding="utf-8", errors="replace") if isinstance(card, Path) else None
        files: dict[str, Path | bytes] = {
            **dense.files,
            **baseline_files(dense),
            INDEX: to_json(index_of(shards)),
            "README.md": model_card(self.family, self.mod, origin, recipe, own_card).encode(),
            "config.json": to_json(config),
        }
        return Translation(config, shards, files)


def plan_conversion(
    source: str | Path,
    *,
    recipe: Recipe | None = None,
    overrides: Sequence[str] = (),
    options: Options | None = None,
    revision: str | None = None,
    headers: bool = False,
) -> Plan:
    """Find out everything about a conversion without writing anything (but for the hub's cache).

    Args:
        source: Folder or hub id.
        recipe: The paper's settings if None, unless the source brings its own.
        overrides: ``key.sub=value`` for the default recipe, where ``recipe`` is None.
        options: See `Options`.
        revision: Hub branch, tag or commit.
        headers: Of a hub id, read the headers over the network and do not download the weights.

    Raises:
        PmodError: Whatever is wrong with the source, or does not fit it.
    """
    options = replace(options or Options(), recipe=recipe)
    opened = open_source(source, revision=revision, allow_pickle=options.allow_pickle, headers=headers)
    refuse_part(opened.folder)
    name = find_format(opened, options.any_family)
    translation = FORMATS[name].translate(opened, options)
    family = find_family(str(translation.config.get("model_type", "")), options.any_family)
    check_decoder(family, translation.config)
    proof = None
    if not family.listed:
        from pmod_cli.conversion.proof import prove  # imports torch

        proof = prove(opened.folder, translation.config)
    tensors = [tensor for shard in translation.shards for tensor in shard.tensors]
    layout = find_decoder(family, translation.config, tensors)
    check_shapes(translation.config, tensors)
    if note := check_processor(translation.config, translation.files):
        translation = replace(translation, notes=[*translation.notes, note])
    if translation.mod is None:
        used = recipe or default_recipe(overrides)
        check_recipe(used, family.name)
        mod = mod_config(used, layout.layers, dense_first(translation.config))
    else:
        if recipe is not None or overrides:
            raise PmodError(f"{opened.name} brings its own retention ratios", "leave --recipe and --set out")
        used, mod = None, translation.mod
        given = len(mod.retention_ratios)
        if given != layout.layers:
            raise PmodError(f"{opened.name}: {given} retention ratios for {layout.layers} decoder layers")
    routers = router_tensors(mod, layout, translation.routers)
    return Plan(opened, name, family, translation, used, mod, layout, routers, proof=proof)


def layer_table(mod: MoDConfig) -> list[dict[str, Any]]:
    """One row per decoder layer: ``layer``, ``kind`` (dense or mod), ``retention_ratio`` (None for dense)."""
    return [
        {"layer": layer, "kind": "dense" if ratio is None else "mod", "retention_ratio": ratio}
        for layer, ratio in enumerate(mod.retention_ratios)
    ]
