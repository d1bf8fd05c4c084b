"""A whole conversion: plan it from headers alone, then write it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pmod_cli.checkpoints.hub import download_files
from pmod_cli.checkpoints.shards import INDEX, StoredTensor, shard_bytes
from pmod_cli.checkpoints.source import Source, open_source
from pmod_cli.checkpoints.write import (
    Progress,
    Staging,
    check_destination,
    check_space,
    link_is_possible,
)
from pmod_cli.conversion.card import model_card, provenance
from pmod_cli.conversion.decoder import DecoderLayout, find_decoder
from pmod_cli.conversion.formats import Options, Shard, Translation, find_format
from pmod_cli.conversion.restore import FOLDER as BASELINE
from pmod_cli.conversion.restore import baseline_files, index_of, plan_baseline, to_json
from pmod_cli.conversion.routers import router_tensors
from pmod_cli.families import Family, check_decoder, find_family
from pmod_cli.modeling.names import is_router
from pmod_cli.modeling.schedule import mean_retention
from pmod_cli.modeling.settings import MoDConfig
from pmod_cli.output.errors import PmodError
from pmod_cli.recipe import Recipe, check_recipe, default_recipe, mod_config

ROUTERS = "model-routers.safetensors"
"""The file of the routers."""


@dataclass(frozen=True)
class Plan:
    """What a conversion will do, known from headers and configs alone.

    Attributes:
        source: The checkpoint.
        format: Name of its format.
        family: Its family.
        translation: The dense checkpoint that it is.
        recipe: What is followed; None if the source brings its own settings.
        mod: Mixture-of-Depths settings, one ratio a layer.
        layout: The decoder.
        routers: Their tensors.
    """

    source: Source
    format: str
    family: Family
    translation: Translation = field(repr=False)
    recipe: Recipe | None
    mod: MoDConfig
    layout: DecoderLayout
    routers: list[StoredTensor] = field(repr=False)

    @property
    def weight_bytes(self) -> int:
        """Size of the baseline's weights."""
        return sum(shard_bytes(shard.tensors) for shard in self.translation.shards)

    @property
    def router_parameters(self) -> int:
        """Parameters added."""
        return sum(math.prod(tensor.shape) for tensor in self.routers)

    def config(self) -> dict[str, Any]:
        """Contents of the new ``config.json``."""
        origin = provenance(self.source.name, self.source.revision, self.format, self.recipe)
        # auto_map names code of the source's repository, which is not run for our model types.
        config = {key: value for key, value in self.translation.config.items() if key != "auto_map"}
        changed = {"architectures": [self.family.architecture], "model_type": self.family.model_type}
        return {**config, **changed, "mod": self.mod.to_dict(), "pmod": origin}

    def checkpoint(self) -> Translation:
        """Everything that is written: the translation with routers, config, index, card and the way back."""
        config = self.config()
        shards = [*self.translation.shards, Shard(ROUTERS, self.routers)]
        card = self.translation.originals.get("README.md")
        own_card = card.read_text(encoding="utf-8", errors="replace") if isinstance(card, Path) else None
        readme = model_card(self.family, self.mod, config["pmod"], self.recipe, own_card)
        files: dict[str, Path | bytes] = {
            **self.translation.files,
            **baseline_files(self.translation),
            INDEX: to_json(index_of(shards)),
            "README.md": readme.encode(),
            "config.json": to_json(config),
        }
        return Translation(config, shards, files)


def layer_table(mod: MoDConfig) -> list[dict[str, Any]]:
    """One row a decoder layer: ``layer``, ``kind`` (dense or mod), ``retention_ratio`` (None for dense)."""
    return [
        {"layer": layer, "kind": "dense" if ratio is None else "mod", "retention_ratio": ratio}
        for layer, ratio in enumerate(mod.retention_ratios)
    ]


@dataclass(frozen=True)
class ConvertResult:
    """What a conversion did.

    Attributes:
        source: As the user named it.
        destination: The new checkpoint.
        to: ``pmod`` or ``baseline``.
        format: Format of the source.
        family: Its family.
        recipe: Name of the recipe, or None.
        layers: See `layer_table`; empty for a baseline.
        mean_retention: Mean share of vision tokens over all layers.
        router_parameters: Parameters added (or, for a baseline, taken away).
        weight_bytes: Size of the baseline's weights.
        methods: Number of weight files by how they were put in place: ``hard link``, ``reflink``, ``copy``,
            ``written``.
        notes: What the user should know.
        seconds: Wall time.
    """

    source: str
    destination: str
    to: str
    format: str
    family: str
    recipe: str | None
    layers: list[dict[str, Any]]
    mean_retention: float | None
    router_parameters: int
    weight_bytes: int
    methods: dict[str, int]
    notes: list[str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Everything, in what JSON can write."""
        return asdict(self)


def plan_conversion(
    source: str | Path,
    *,
    recipe: Recipe | None = None,
    overrides: Sequence[str] = (),
    fmt: str | None = None,
    options: Options | None = None,
    revision: str | None = None,
    headers: bool = False,
) -> Plan:
    """Find out everything about a conversion without writing anything (but for the hub's cache).

    Args:
        source: Folder or hub id.
        recipe: The paper's settings if None, unless the source brings its own.
        overrides: ``key.sub=value`` for the default recipe, where ``recipe`` is None.
        fmt: Name of the source's format; detected if None.
        options: See `Options`.
        revision: Hub branch, tag or commit.
        headers: Of a hub id, read the headers over the network and do not download the weights.

    Raises:
        PmodError: Whatever is wrong with the source, or does not fit it.
    """
    options = options or Options()
    opened = open_source(source, revision=revision, allow_pickle=options.allow_pickle, headers=headers)
    name, module = find_format(opened, fmt)
    translation = module.translate(opened, options)
    family = find_family(str(translation.config.get("model_type", "")))
    check_decoder(family, translation.config)
    tensors = [tensor for shard in translation.shards for tensor in shard.tensors]
    layout = find_decoder(family, translation.config, tensors)
    if translation.mod is not None:
        if recipe is not None or overrides:
            raise PmodError(f"{opened.name} brings its own retention ratios", "leave --recipe and --set out")
        mod, used = translation.mod, None
        if len(mod.retention_ratios) != layout.layers:
            raise PmodError(
                f"{opened.name}: {len(mod.retention_ratios)} retention ratios for {layout.layers} decoder layers"
            )
    else:
        used = recipe or default_recipe(overrides)
        check_recipe(used, family.name)
        mod = mod_config(used, layout.layers)
    routers = router_tensors(mod, layout, translation.routers)
    return Plan(opened, name, family, translation, used, mod, layout, routers)


def convert(
    plan: Plan,
    destination: Path,
    *,
    force: bool = False,
    copy: bool = False,
    progress: Progress | None = None,
) -> ConvertResult:
    """Write what was planned; the destination appears complete or not at all.

    Args:
        plan: See `plan_conversion`.
        destination: Folder of the new checkpoint.
        force: Replace a checkpoint that is there.
        copy: Copy the weights where links would do.
        progress: Called with a number of bytes each time that many more are in place.

    Raises:
        PmodError: The destination exists, cannot be written, or has no room.
    """
    started = time.perf_counter()
    methods = _write(plan.source, plan.checkpoint(), destination, force, copy, progress)
    return ConvertResult(
        source=plan.source.name,
        destination=str(destination),
        to="pmod",
        format=plan.format,
        family=plan.family.name,
        recipe=plan.recipe.name if plan.recipe else None,
        layers=layer_table(plan.mod),
        mean_retention=mean_retention(plan.mod.retention_ratios),
        router_parameters=plan.router_parameters,
        weight_bytes=plan.weight_bytes,
        methods=methods,
        notes=list(plan.translation.notes),
        seconds=time.perf_counter() - started,
    )


def convert_back(
    source: str | Path,
    destination: Path,
    *,
    revision: str | None = None,
    force: bool = False,
    copy: bool = False,
    progress: Progress | None = None,
) -> ConvertResult:
    """Write the dense baseline of a p-MoD checkpoint: bit for bit what was converted, if it was not trained since.

    Args:
        source: Folder or hub id of a p-MoD checkpoint.
        destination: Folder of the dense checkpoint.
        revision: Hub branch, tag or commit.
        force: Replace a checkpoint that is there.
        copy: Copy the weights where links would do.
        progress: See `convert`.

    Raises:
        PmodError: The source is not p-MoD, or the destination cannot be written.
    """
    started = time.perf_counter()
    opened = open_source(source, revision=revision)
    if opened.revision is not None:
        download_files(opened.name, opened.revision, [f"{BASELINE}/*"])
    dense = plan_baseline(opened)
    methods = _write(opened, dense, destination, force, copy, progress)
    routers = [t for file in opened.weight_files() for t in file.tensors.values() if is_router(t.name)]
    return ConvertResult(
        source=opened.name,
        destination=str(destination),
        to="baseline",
        format="huggingface",
        family=find_family(opened.model_type).name,
        recipe=None,
        layers=[],
        mean_retention=None,
        router_parameters=sum(math.prod(tensor.shape) for tensor in routers),
        weight_bytes=sum(shard_bytes(shard.tensors) for shard in dense.shards),
        methods=methods,
        notes=list(dense.notes),
        seconds=time.perf_counter() - started,
    )


def bytes_needed(checkpoint: Translation, destination: Path, copy: bool = False) -> int:
    """Disk space that writing takes, as far as it can be known before: links take none."""
    total = sum(
        shard_bytes(shard.tensors)
        for shard in checkpoint.shards
        if copy or shard.linked is None or not link_is_possible(shard.linked, destination)
    )
    for file in checkpoint.files.values():
        total += len(file) if isinstance(file, bytes) else file.stat().st_size
    return total


def _write(
    source: Source,
    checkpoint: Translation,
    destination: Path,
    force: bool,
    copy: bool,
    progress: Progress | None,
) -> dict[str, int]:
    """Write shards and files; returns how many weight files were put in place by which means."""
    check_destination(destination, source.folder, force)
    check_space(destination, bytes_needed(checkpoint, destination, copy))
    with Staging(destination, progress) as staging:
        for shard in checkpoint.shards:
            if shard.linked is not None:
                staging.place(shard.name, shard.linked, copy)
            else:
                staging.write_shard(shard.name, shard.tensors)
        for name, file in checkpoint.files.items():
            staging.write(name, file)
        staging.commit()
        return dict(staging.methods)
