"""A checkpoint with routers and ratios that were found elsewhere (``pmod calibrate``), on the weights of another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pmod_cli.checkpoints.hub import download
from pmod_cli.checkpoints.load import check_source, refuse_unconverted
from pmod_cli.checkpoints.shards import INDEX, SINGLE, TORCH_DTYPES, StoredTensor
from pmod_cli.checkpoints.source import Source, open_source
from pmod_cli.conversion.decoder import DecoderLayout, find_decoder, router_tensors
from pmod_cli.conversion.formats import Options
from pmod_cli.conversion.formats.huggingface import translate
from pmod_cli.conversion.formats.translation import Translation, shard_name
from pmod_cli.conversion.plan import Plan
from pmod_cli.conversion.restore import FOLDER, plan_baseline
from pmod_cli.families import Family, check_decoder, find_family
from pmod_cli.modeling.settings import MoDConfig


@dataclass(frozen=True)
class CheckpointBase:
    """A dense or p-MoD checkpoint in transformers' format, as the dense checkpoint that is in it.

    Attributes:
        source: What was opened.
        translation: The dense checkpoint.
    """

    source: Source
    family: Family
    translation: Translation
    layout: DecoderLayout

    @property
    def folder(self) -> str:
        """What transformers loads."""
        return str(self.source.folder)

    @property
    def dense_config(self) -> dict[str, Any]:
        """Contents of the dense model's ``config.json``."""
        return self.translation.config

    @property
    def router_dtype(self) -> str:
        """Number format of routers in it, as torch calls it."""
        return TORCH_DTYPES[self.layout.dtype]

    @classmethod
    def open(cls, name: str | Path) -> CheckpointBase:
        """Open a folder or hub id; a `PmodError` says what is wrong with it."""
        check_source(name)
        source = open_source(name)
        refuse_unconverted(source)
        family = find_family(source.model_type)
        check_decoder(family, source.config)
        if source.model_type == family.model_type:
            if source.revision is not None:
                download(source.name, source.revision, [f"{FOLDER}/*"])
            translation = _without_routers(plan_baseline(source))
        else:
            translation = translate(source, Options())
        tensors = [tensor for shard in translation.shards for tensor in shard.tensors]
        return cls(source, family, translation, find_decoder(family, translation.config, tensors))

    def plan(
        self,
        mod: MoDConfig,
        routers: Mapping[str, StoredTensor],
        summary: dict[str, Any],
        files: Mapping[str, bytes],
    ) -> Plan:
        """The conversion that writes these routers and settings.

        Args:
            mod: Settings, one ratio per layer.
            routers: By the names that ``layout.router_name`` gives; none for zeros.
            summary: What ``config.json`` says of the calibration.
            files: More files, by name.
        """
        translation = replace(self.translation, files={**self.translation.files, **files})
        tensors = router_tensors(mod, self.layout, dict(routers))
        return Plan(
            self.source, "huggingface", self.family, translation, None, mod, self.layout, tensors, summary
        )


def _without_routers(dense: Translation) -> Translation:
    """The baseline of a p-MoD checkpoint as `translate` would give it."""
    shards = [
        replace(shard, name=shard_name(1, 1), original=SINGLE) if shard.name == SINGLE else shard
        for shard in dense.shards
    ]
    replaced = ("config.json", INDEX, "README.md")
    originals = {name: file for name, file in dense.files.items() if name in replaced}
    files = {name: file for name, file in dense.files.items() if name not in replaced}
    return replace(dense, shards=shards, files=files, originals=originals)
