"""Recipes: a YAML file that says how to make a p-MoD model of a baseline and how to train it.

Validated strictly: an unknown key is an error that names the nearest known key.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from pmod_cli.modeling.schedule import SCHEDULES, Ratios
from pmod_cli.modeling.settings import MoDConfig
from pmod_cli.modeling.weight_norm import WEIGHT_NORMS
from pmod_cli.output.errors import PmodError
from pmod_cli.output.reading import read_text


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError(f"{str(value).lower()} is none of its values")  # pydantic takes it for a number
        return value


class ModSettings(_Section):
    """The Mixture-of-Depths part of a recipe; the defaults are the paper's."""

    schedule: str = "shifted_cosine"
    shift: float = Field(0.5, ge=0, le=1)
    ceiling: float = Field(0.85, gt=0, le=1)
    floor: float = Field(0.15, ge=0, le=1)
    ratio: float = Field(0.5, gt=0, le=1)
    first_layer: int = Field(2, ge=0, lt=2**31)
    last_layer: int | None = Field(None, ge=0)
    ratios: tuple[float | None, ...] | None = Field(None, max_length=1000)
    weight_norm: str = "tanh"
    weight_scale: float = 0.2
    weight_bias: float = 1.0
    router_bias: bool = True
    target_tokens: Literal["vision", "vision_hr", "all"] = "vision"
    coverage: float | tuple[float, ...] = 0.0
    choice: Literal["router", "random"] = "router"

    @field_validator("schedule", "weight_norm")
    @classmethod
    def _known(cls, value: str, info: ValidationInfo) -> str:
        known = SCHEDULES if info.field_name == "schedule" else WEIGHT_NORMS
        if value not in known:
            what = str(info.field_name).replace("_", " ")
            raise ValueError(f"unknown {what} {value!r}, {suggestion(value, known)}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> ModSettings:
        if (self.ratios is not None) != (self.schedule == "explicit"):
            raise ValueError("mod.ratios goes with mod.schedule: explicit, and only with it")
        for ratio in self.ratios or ():
            if ratio is not None and not 0 < ratio <= 1:
                raise ValueError(f"mod.ratios: {ratio} is outside (0, 1]")
        used = inspect.signature(SCHEDULES[self.schedule]).parameters
        for name in ("shift", "ceiling", "floor", "ratio", "first_layer", "last_layer"):
            if name not in used and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"mod.{name} is nothing that the schedule {self.schedule} looks at")
        if self.floor > self.ceiling:
            raise ValueError("mod.floor is above mod.ceiling")
        return self

    def retention_ratios(self, num_layers: int) -> Ratios:
        """Apply the schedule to a decoder of ``num_layers`` layers: one ratio per layer, None for a dense one."""
        schedule = SCHEDULES[self.schedule]
        parameters = [name for name in inspect.signature(schedule).parameters if name != "num_layers"]
        try:
            return schedule(num_layers, **{name: getattr(self, name) for name in parameters})
        except ValueError as error:
            raise PmodError(f"schedule {self.schedule}: {error}") from error


class LoraSettings(_Section):
    """LoRA on the decoder's linear layers; routers are trained in full beside it."""

    r: int = Field(128, gt=0, le=8192)
    alpha: int = Field(256, gt=0, lt=2**31)
    dropout: float = Field(0.05, ge=0, lt=1)


class TrainSettings(_Section):
    """How to fine-tune; the defaults are the paper's (section 4.1) unless the field says otherwise."""

    epochs: float = Field(1.0, gt=0, le=10**6)
    max_steps: int = Field(
        -1, ge=-1, lt=2**31, description="Stop after so many optimizer steps; -1 for whole epochs."
    )
    global_batch_size: int = Field(128, gt=0, lt=2**31)
    micro_batch_size: int = Field(4, gt=0, lt=2**31, description="Samples a device holds at once.")
    learning_rate: float = Field(2e-5, gt=0)
    router_learning_rate: float | None = Field(None, ge=0)
    lr_scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    adam_beta2: float = Field(0.999, gt=0, lt=1)
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    gradient_checkpointing: bool = True
    max_length: int = Field(2048, gt=0, lt=2**31)
    image_aspect_ratio: Literal["pad", "anyres", "processor"] = "processor"
    chat_template: Literal["processor", "vicuna_v1"] = "processor"
    image_position: Literal["written", "front"] = "written"
    group_by_modality_length: bool = True
    freeze_vision_tower: bool = True
    parts: tuple[Literal["routers", "lora"], ...] | None = Field(
        None, description="Train these alone, with distill; none for everything, or with lora for LoRA's set."
    )
    distill: bool = Field(False, description="Learn the dense model's token distributions, not the labels.")
    attn_implementation: str | None = None
    kernels: Literal["auto", "torch", "liger"] = Field("auto", description="See --kernels of pmod profile.")
    num_workers: int = Field(4, ge=0, lt=2**31)
    max_bad_samples: int = Field(100, ge=0, lt=2**31)
    ratio_warmup_steps: int = Field(0, ge=0, lt=2**31)
    save_steps: int = Field(500, gt=0, lt=2**31)
    logging_steps: int = Field(10, gt=0, lt=2**31)
    router_stats_steps: int = Field(
        100, gt=0, lt=2**31, description="Steps between two looks at the routers."
    )
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    seed: int = Field(42, ge=0, lt=2**32)
    lora: LoraSettings | None = None

    @field_validator("max_steps")
    @classmethod
    def _some(cls, value: int) -> int:
        if value == 0:
            raise ValueError("0 steps train nothing; -1 stands for whole epochs")
        return value

    @model_validator(mode="before")
    @classmethod
    def _default_lora(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(parts := data.get("parts"), (list, tuple)):
            return data
        return data | {"lora": {}} if "lora" in parts and data.get("lora") is None else data

    @model_validator(mode="after")
    def _consistent(self) -> TrainSettings:
        if self.parts is not None and "routers" not in self.parts:
            raise ValueError("train.parts is [routers] or [routers, lora]")
        if self.lora is not None and self.parts is not None and "lora" not in self.parts:
            raise ValueError("train.lora goes with lora in train.parts")
        if self.distill != (self.parts is not None):
            raise ValueError(
                "train.parts and train.distill: true go together: the frozen model is what is learned from"
            )
        return self

    @property
    def backbone_frozen(self) -> bool:
        """Whether most weights stay as they are, and are held in ``dtype``."""
        return self.parts is not None or self.lora is not None

    @property
    def learns_choice(self) -> bool:
        """Whether routers are trained through the choice of tokens: what they would lose without."""
        return "routers" in (self.parts or ())

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_or_none(cls, value: Any) -> Any:
        if value in ("none", None):
            return ()
        return (value,) if isinstance(value, str) else value


class Recipe(_Section):
    """A whole recipe."""

    name: str
    description: str = ""
    family: str | None = Field(None, description="llava, llava_next, ...: the family it is meant for.")
    source: str | dict[str, str] | None = Field(
        None, description="The baseline: a hub id, or parts (language_model, vision_tower, projector)."
    )
    config: str | None = Field(None, description="Geometry for profiling without a checkpoint.")
    mod: ModSettings = ModSettings()
    train: TrainSettings = TrainSettings()


def recipe_dir() -> Path:
    """The folder of shipped recipes: inside an installed wheel, or at the top of a source checkout."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "recipes"


def shipped_recipes() -> list[str]:
    """Names of the shipped recipes, sorted."""
    return sorted(path.stem for path in recipe_dir().glob("*.yaml"))


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load a shipped recipe by name, or any by path.

    Overrides are ``key.sub=value`` pairs, whose values are YAML; they are applied last.

    Raises:
        PmodError: Unknown name, unreadable file, invalid YAML, unknown key or bad value.
    """
    path = Path(name_or_path)
    if path.suffix not in {".yaml", ".yml"}:
        shipped = recipe_dir() / f"{name_or_path}.yaml"
        if not shipped.is_file():
            name = str(name_or_path)
            raise PmodError(f"no recipe named {name!r}", suggestion(name, shipped_recipes()))
        path = shipped
    try:
        text = read_text(path, 2**20)
    except FileNotFoundError:
        raise PmodError(f"no recipe file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PmodError(f"cannot read recipe {path}: {error}") from error
    data = _yaml(text, f"recipe {path} is not valid YAML")
    if not isinstance(data, dict):
        raise PmodError(f"recipe {path} is not a mapping of keys to values")
    data.setdefault("name", path.stem)
    return parse_recipe(data, overrides, str(path))


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice: one of its values would be lost."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if isinstance(key.value, str) and key.value in seen:
                raise yaml.YAMLError(f"{key.value} stands twice, again in line {key.start_mark.line + 1}")
            if isinstance(key.value, str):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _yaml(text: str, wrong: str) -> Any:
    """What YAML says; a `PmodError` that begins with ``wrong`` if it is none."""
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # PyYAML lets through whatever a tag's value leads its constructor into
        raise PmodError(f"{wrong}: {' '.join(str(error).split())}") from error


def default_recipe(overrides: Sequence[str] = ()) -> Recipe:
    """The paper's settings, for when no recipe is named."""
    return parse_recipe({"name": "default"}, overrides, "default recipe")


def parse_recipe(data: dict[str, Any], overrides: Sequence[str] = (), where: str = "recipe") -> Recipe:
    """Validate a mapping as a recipe, after applying ``key.sub=value`` overrides; a `PmodError` says what is wrong."""
    for override in overrides:
        _override(data, override)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise PmodError(f"{where}: {_explain(error)}") from None


def _override(data: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator:
        raise PmodError(f"--set {override}: expected key=value", "e.g. --set mod.floor=0.1")
    *sections, last = key.strip().split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise PmodError(f"--set {override}: {section} is not a section")
    data[last] = _yaml(value, f"--set {override}: {value!r} is not a YAML value")


def check_recipe(recipe: Recipe, family: str) -> None:
    """Refuse a recipe that is meant for another family."""
    if recipe.family not in (None, family):
        raise PmodError(
            f"recipe {recipe.name} is for {recipe.family}, and the source is {family}",
            "choose a recipe of its family, or --set family=null if you mean it",
        )


def mod_config(recipe: Recipe, layers: int, dense_first: int = 0) -> MoDConfig:
    """The Mixture-of-Depths settings of a recipe for a decoder of so many layers.

    Of a schedule's ratios those of the ``dense_first`` layers are left out; ``explicit`` ones are followed.

    Raises:
        PmodError: The schedule or the coverage does not fit, a ratio is outside (0, 1], or every layer stays dense.
    """
    ratios = recipe.mod.retention_ratios(layers)
    if recipe.mod.schedule != "explicit":
        ratios = [None if layer < dense_first else ratio for layer, ratio in enumerate(ratios)]
    for layer, ratio in enumerate(ratios):
        if ratio is not None and not 0 < ratio <= 1:
            raise PmodError(
                f"recipe {recipe.name}: the retention ratio of layer {layer} is {ratio:g}, outside (0, 1]",
                "raise mod.floor or lower mod.ceiling",
            )
    if all(ratio is None for ratio in ratios):
        raise PmodError(f"recipe {recipe.name} leaves all {layers} decoder layers dense")
    settings = recipe.mod.model_dump(mode="json", include={field.name for field in fields(MoDConfig)})
    try:
        return MoDConfig(ratios, **settings)
    except ValueError as error:
        raise PmodError(f"recipe {recipe.name}: {error}") from error


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word most like ``word``, or None if nothing is near."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None


def suggestion(word: str, known: Iterable[str], prefix: str = "") -> str:
    """The known word that may have been meant, behind a prefix; all of them if nothing is near."""
    near = nearest(word, known)
    return f"did you mean {prefix}{near}?" if near else f"known: {', '.join(known)}"


_SECTIONS: dict[tuple[str, ...], type[BaseModel]] = {
    (): Recipe,
    ("mod",): ModSettings,
    ("train",): TrainSettings,
    ("train", "lora"): LoraSettings,
}


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    location = tuple(str(part) for part in first["loc"])
    dotted = ".".join(location)
    if first["type"] == "extra_forbidden":
        known = _SECTIONS[location[:-1]].model_fields
        return f"unknown key {dotted}, {suggestion(location[-1], known, dotted.removesuffix(location[-1]))}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{dotted}: {message}" if dotted else message
