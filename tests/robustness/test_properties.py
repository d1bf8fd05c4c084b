"""Recipes, records and headers of any kind whatever: they are taken, or refused by an error of the right kind."""

from __future__ import annotations

import json
import struct
from contextlib import suppress

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from pmod_cli.checkpoints.shards import read_header
from pmod_cli.data.records import BadSample, parse_record, read_records
from pmod_cli.output.errors import PmodError
from pmod_cli.recipe import ModSettings, Recipe, TrainSettings, load_recipe, mod_config

SCALARS = some.none() | some.booleans() | some.integers() | some.floats() | some.text(max_size=8)
VALUES = some.recursive(
    SCALARS,
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text(max_size=5), inner, max_size=3),
)
QUICK = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def _some_of(model, **more):
    return some.fixed_dictionaries({}, optional=dict.fromkeys(model.model_fields, VALUES) | more)


@QUICK
@given(
    _some_of(Recipe, mod=_some_of(ModSettings), train=_some_of(TrainSettings)) | VALUES, some.integers(1, 80)
)
def test_recipes(tmp_path, data, layers):
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    with suppress(PmodError):
        settings = mod_config(load_recipe(tmp_path / "x.yaml"), layers)
        assert len(settings.retention_ratios) == layers
        assert all(ratio is None or 0 < ratio <= 1 for ratio in settings.retention_ratios)


@QUICK
@given(some.binary(max_size=200) | some.text(max_size=200).map(str.encode))
def test_recipes_of_any_bytes(tmp_path, content):
    (tmp_path / "x.yaml").write_bytes(content)
    with suppress(PmodError):
        assert load_recipe(tmp_path / "x.yaml").name


TURNS = some.lists(
    some.fixed_dictionaries(
        {}, optional={"from": some.sampled_from(["human", "gpt", "system"]) | VALUES, "value": VALUES}
    ),
    max_size=4,
)
RECORDS = some.fixed_dictionaries(
    {}, optional={"id": VALUES, "image": VALUES, "conversations": TURNS | VALUES}
)


@QUICK
@given(some.lists(RECORDS | VALUES, min_size=1, max_size=3))
def test_records(tmp_path, records):
    (tmp_path / "x.json").write_text(json.dumps(records))
    for index, (_, record) in enumerate(read_records(tmp_path / "x.json")):
        with suppress(BadSample):
            conversation = parse_record(record, index)
            assert sum(turn.images for turn in conversation.turns) == len(conversation.images)


@QUICK
@given(
    some.binary(max_size=200) | some.text(max_size=200).map(str.encode), some.sampled_from(["json", "jsonl"])
)
def test_records_of_any_bytes(tmp_path, content, suffix):
    (tmp_path / f"x.{suffix}").write_bytes(content)
    with suppress(PmodError):
        assert list(read_records(tmp_path / f"x.{suffix}"))


ENTRY = some.fixed_dictionaries(
    {},
    optional={
        "dtype": some.sampled_from(["F32", "BF16", "I64", "F4"]) | VALUES,
        "shape": some.lists(some.integers(-2, 2**70), max_size=3) | VALUES,
        "data_offsets": some.lists(some.integers(-8, 64) | some.floats(), max_size=3) | VALUES,
    },
)
HEADERS = (some.dictionaries(some.text(max_size=6), ENTRY | VALUES, max_size=3) | VALUES).map(
    lambda header: json.dumps(header).encode()
) | some.binary(max_size=100)


@QUICK
@given(HEADERS, some.integers(-9, 9), some.binary(max_size=64))
def test_headers(tmp_path, header, wrong, data):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", max(0, len(header) + wrong)) + header + data)
    with suppress(PmodError):
        tensors = read_header(path)
        assert sum(tensor.nbytes for tensor in tensors.values()) == sum(
            len(tensor.read()) for tensor in tensors.values()
        )
