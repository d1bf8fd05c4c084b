"""Where samples come from, their order, their batches, and the shape of pictures."""

from __future__ import annotations

import io
import json
import os
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from pmod_cli.data.batches import Collator, EncodedDataset, OrderedSampler, longest_sample
from pmod_cli.data.check import check_data
from pmod_cli.data.dataset import open_data
from pmod_cli.data.records import BadSample, Conversation, Turn
from pmod_cli.output.errors import PmodError
from pmod_cli.training.model import apply_aspect


def _samples():
    return [
        Conversation(
            str(i), ("x.png",) if i % 3 else (), (Turn("user", "a" * (i * 37 % 101)), Turn("assistant", "b"))
        )
        for i in range(101)
    ]


@pytest.mark.parametrize("group", [None, 8])
def test_an_order_is_a_permutation_that_seed_and_epoch_decide(group):
    samples = _samples()

    def order(seed, epoch):
        sampler = OrderedSampler(samples, seed, group)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert sorted(order(1, 0)) == list(range(101))
    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


def test_groups_are_of_one_modality():
    samples = _samples()
    order = list(OrderedSampler(samples, 3, 8))
    groups = [order[i : i + 8] for i in range(0, 101, 8)]
    pure = [len({bool(samples[i].images) for i in group}) == 1 for group in groups]
    # 34 without and 67 with pictures: 4 and 8 whole groups, what is left is mixed.
    assert pure[:12] == [True] * 12


def test_groups_are_of_like_length():
    samples = _samples()
    lengths = [sum(len(turn.text) for turn in sample.turns) for sample in samples]

    def spread(order):
        groups = [order[i : i + 8] for i in range(0, 96, 8)]
        return np.mean([np.ptp([lengths[i] for i in group]) for group in groups])

    assert spread(list(OrderedSampler(samples, 3, 8))) < 0.4 * spread(list(OrderedSampler(samples, 3)))


def test_every_rank_gets_one_modality_in_a_global_batch():
    """As accelerate deals micro batches out: a global batch is consecutive, so none mixes the modalities."""
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    samples = _samples()
    sampler = OrderedSampler(samples, 3, 8)
    shards = [list(BatchSamplerShard(BatchSampler(sampler, 2, False), 2, rank)) for rank in range(2)]
    for step in range(12):  # two micro batches of two on each of two ranks
        batch = [i for shard in shards for micro in shard[2 * step : 2 * step + 2] for i in micro]
        assert len(batch) == 8
        assert len({bool(samples[i].images) for i in batch}) == 1


def _png(colour, size=(80, 80)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def table():
    """As `lmms-lab/LLaVA-NeXT-Data` is laid out: an image column, empty where there is none."""
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    def turns(question, answer):
        return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]

    rows = {
        "id": ["a", "b", "c", "d"],
        "image": [{"bytes": _png("red"), "path": "x.png"}, None, {"bytes": b"cut", "path": None}, None],
        "conversations": [
            turns("<image>\nWhat colour?", "red"),
            turns("Say red.", "red"),
            turns("<image>\nWhat colour?", "blue"),
            turns("Say blue.", ""),
        ],
        "data_source": ["x"] * 4,
    }
    turn = {"from": Value("string"), "value": Value("string")}
    features = Features(
        {
            "id": Value("string"),
            "image": ImageFeature(),
            "conversations": List(turn),
            "data_source": Value("string"),
        }
    )
    return Dataset.from_dict(rows, features=features)


@pytest.mark.parametrize("layout", ["saved", "parquet"])
def test_a_datasets_folder_is_data(table, tmp_path, processor, layout):
    folder = tmp_path / "table"
    if layout == "saved":
        table.save_to_disk(str(folder))
    else:
        (folder / "data").mkdir(parents=True)
        table.to_parquet(str(folder / "data" / "train-00000-of-00001.parquet"))
    source = open_data(folder, None)
    data = source
    assert [(sample.id, sample.images) for sample in data.samples] == [
        ("a", ("0",)),
        ("b", ()),
        ("c", ("2",)),
    ]
    assert data.bad == {"d": "empty answer"}
    assert data.missing_images() == {}
    assert data.pictures.load("0").getpixel((3, 3)) == (255, 0, 0)
    with pytest.raises(BadSample, match="unreadable image"):
        data.pictures.load("2")
    assert open_data(folder, None).fingerprint == source.fingerprint
    batch = Collator(processor)([EncodedDataset(data.samples, data.pictures, processor, 300)[0]])
    assert batch["pixel_values"].shape == (1, 3, 80, 80)
    clean = tmp_path / "clean"
    report = check_data(folder, None, processor=processor, fix=clean)
    assert report["counts"] == {"unreadable image": 1, "empty answer": 1}
    again = check_data(clean, None)
    assert (again["records"], again["problems"]) == (2, [])


def test_a_list_of_pictures_in_a_table_and_a_path_out_of_it(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features, List, Value
    from datasets import Image as ImageFeature

    outside = tmp_path / "outside.png"
    outside.write_bytes(_png("red"))
    cells = [
        [{"bytes": _png("red"), "path": None}, {"bytes": _png("blue"), "path": None}],
        [{"bytes": None, "path": str(outside)}],
    ]
    turn = {"from": Value("string"), "value": Value("string")}
    turns = [
        [{"from": "human", "value": "<image>" * len(cell)}, {"from": "gpt", "value": "yes"}] for cell in cells
    ]
    features = Features({"images": List(ImageFeature(decode=False)), "conversations": List(turn)})
    folder = tmp_path / "table"
    folder.mkdir()
    # `datasets` itself would read the file and put its bytes into the table.
    columns = pa.table({"images": cells, "conversations": turns}, schema=features.arrow_schema)
    pq.write_table(columns, folder / "train.parquet")
    data = open_data(folder, None)
    assert [sample.images for sample in data.samples] == [("0:0", "0:1"), ("1:0",)]
    assert data.pictures.load("0:1").getpixel((0, 0)) == (0, 0, 255)
    with pytest.raises(BadSample, match="path leaves the folder"):
        data.pictures.load("1:0")


@pytest.mark.parametrize("column", [{"image": None}, {"images": []}])
def test_a_table_in_which_no_row_has_a_picture(tmp_path, column):
    import pyarrow as pa
    import pyarrow.parquet as pq

    talk = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
    pq.write_table(pa.Table.from_pylist([{"conversations": talk} | column] * 2), tmp_path / "d.parquet")
    data = open_data(tmp_path / "d.parquet", None)
    assert [sample.images for sample in data.samples] == [(), ()]


def test_a_list_in_which_a_picture_is_missing(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pictures = pa.array([[None]], pa.list_(pa.binary()))
    talk = [[{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "So."}]]
    pq.write_table(pa.table({"conversations": talk, "images": pictures}), tmp_path / "d.parquet")
    assert check_data(tmp_path / "d.parquet", None)["counts"] == {"missing image": 1}


def test_tables_that_are_none(tmp_path):
    from datasets import Dataset

    Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "other"))
    names = {"image": ["a.png"], "conversations": [[{"from": "human", "value": "a"}]]}
    Dataset.from_dict(names).save_to_disk(str(tmp_path / "names"))
    with pytest.raises(PmodError, match="holds no images"):
        open_data(tmp_path / "names", None)
    with pytest.raises(PmodError, match=r"lacks the columns conversations and image.*text"):
        open_data(tmp_path / "other", None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(PmodError, match="cannot open data set"):
        open_data(tmp_path / "empty", None)
    with pytest.raises(PmodError, match="cannot open data set nobody/nothing"):  # no network here
        open_data("nobody/nothing", None)


def test_a_file_that_names_images_wants_their_folder(demo_data, tmp_path):
    with pytest.raises(PmodError, match="names image files"):
        open_data(demo_data[0], None)
    with pytest.raises(PmodError, match="no image folder"):
        open_data(demo_data[0], tmp_path / "none")
    records = [record for record in json.loads(demo_data[0].read_text()) if "image" not in record]
    text_only = tmp_path / "text.jsonl"
    text_only.write_text("\n".join(map(json.dumps, records)))
    assert len(open_data(text_only, None).samples) == 8


def test_images_are_loaded_in_workers_and_give_the_same_batches(demo_data, processor):
    from torch.utils.data import DataLoader

    data = open_data(*demo_data)
    dataset = EncodedDataset(data.samples, data.pictures, processor, 300)
    batches = []
    for workers in (0, 2):
        loader = DataLoader(dataset, 8, collate_fn=Collator(processor), num_workers=workers)
        batches.append(list(loader))
    assert len(batches[0]) == len(batches[1]) == 4
    for alone, worked in zip(*batches, strict=True):
        assert alone["notes"] == worked["notes"]
        for name in ("input_ids", "labels", "attention_mask"):
            assert torch.equal(alone[name], worked[name])
        assert ("pixel_values" in alone) == ("pixel_values" in worked)
    real = Counter(len(batch["notes"]["ids"]) for batch in batches[0])
    assert real == {8: 4}


def test_longest_sample_is_a_bound(demo_data, processor):
    data = open_data(*demo_data)
    dataset = EncodedDataset(data.samples, data.pictures, processor, 2048)
    tokens, vision = longest_sample(dataset)
    assert vision == 100
    assert max(len(dataset[index].encoded.input_ids) for index in range(len(dataset))) <= tokens <= 2048


def test_labels_before_the_first_answer_are_cut_and_the_loss_is_the_same(pmod_start, demo_data, processor):
    from transformers import AutoModelForImageTextToText

    data = open_data(*demo_data)
    dataset = EncodedDataset(data.samples, data.pictures, processor, 2048)
    items = [dataset[0], dataset[1], dataset[25]]
    for batch in ([items[0], items[1]], items):
        inputs = Collator(processor)(batch)
        inputs.pop("notes")
        length = inputs["input_ids"].shape[1]
        assert inputs["labels"].shape[1] == inputs["logits_to_keep"] <= length
        # With pictures in all samples, none of their tokens gets logits.
        assert len(batch) == 3 or inputs["logits_to_keep"] <= length - 100
        whole = {**inputs, "logits_to_keep": 0}
        rows = [item.encoded.labels for item in batch]
        whole["labels"] = torch.tensor([row + [-100] * (length - len(row)) for row in rows])
        results = []
        for each in (inputs, whole):
            model = AutoModelForImageTextToText.from_pretrained(pmod_start, dtype=torch.float32).train()
            loss = model(**each, use_cache=False).loss
            loss.backward()
            gradient = model.model.multi_modal_projector.linear_1.weight.grad
            results.append((loss.detach(), gradient))
        torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-7)


def test_pad_keeps_the_whole_picture(baseline):
    from pmod_cli.generation import VisionLanguageModel

    loaded = VisionLanguageModel.load(baseline, dtype="float32", device="cpu")
    picture = np.full((40, 80, 3), 255, np.uint8)
    picture[:, :8] = 0
    picture[:, -8:] = 0
    image = Image.fromarray(picture)
    processor = apply_aspect(loaded.model.config, loaded.processor, "pad")
    pixels = processor.image_processor([image], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 80, 80)
    row = pixels[0, 0, 40]
    assert row[0] == row[-1] == row.min()
    # Above and below is the mean colour, which is zero once normalised.
    assert torch.all(pixels[0, :, 2].abs() < 0.02)


def _readme(pattern):
    return f"---\nconfigs:\n- config_name: default\n  data_files: {pattern}\n---\n"


@pytest.fixture
def secret(table, tmp_path):
    """``secret`` has data, ``tab`` a stranger's folder of it, ``saved`` one of `save_to_disk`."""
    for name in ("secret", "tab"):
        (tmp_path / name).mkdir()
        table.to_parquet(tmp_path / name / "d.parquet")
    table.save_to_disk(tmp_path / "saved")
    table.save_to_disk(tmp_path / "secret" / "saved")
    return tmp_path


@pytest.mark.parametrize(
    "pattern",
    ["../secret/d.parquet", "../secret/*", "{root}/secret/d.parquet", "hf://datasets/user/name/d.parquet",
     "[{{split: train, path: [a/../../secret/d.parquet]}}]",
     "file:{root}/secret/d.parquet", "'d::../secret/d.parquet'"],
)  # fmt: skip
def test_a_folder_of_data_names_nothing_outside(secret, pattern):
    (secret / "tab" / "README.md").write_text(_readme(pattern.format(root=secret)))
    with pytest.raises(PmodError, match="names data outside"):
        open_data(secret / "tab", None)


def test_a_folder_of_data_is_opened_as_its_readme_says(secret):
    (secret / "tab" / "more").mkdir()
    (secret / "tab" / "d.parquet").rename(secret / "tab" / "more" / "d.parquet")
    (secret / "tab" / "other.parquet").write_bytes(b"none")
    (secret / "tab" / "README.md").write_text(_readme("more/*.parquet"))
    assert len(open_data(secret / "tab", None).records) == 4
    (secret / "tab" / "README.md").write_text(_readme("nothing/*.nosuch"))
    with pytest.raises(PmodError, match="cannot open data set") as error:
        open_data(secret / "tab", None)
    assert len(str(error.value)) < 600


def test_a_folder_of_data_has_no_links_out_and_nothing_that_is_waited_for(secret):
    for kind, why in (("link", "is a link out"), ("pipe", "is not a regular file")):
        (secret / "tab" / "d.parquet").unlink()
        if kind == "link":
            (secret / "tab" / "d.parquet").symlink_to("../secret/d.parquet")
        else:
            os.mkfifo(secret / "tab" / "d.parquet")
        with pytest.raises(PmodError, match=why):
            open_data(secret / "tab", None)
    with pytest.raises(PmodError, match="not a regular file"):
        open_data(secret / "tab" / "d.parquet", None)
    with pytest.raises(PmodError, match="no data file"):
        open_data(secret / "nosuch.parquet", None)


def test_a_snapshot_in_the_hub_s_cache_is_data(secret):
    blobs, snapshot = secret / "hub" / "blobs", secret / "hub" / "snapshots" / "1" / "data"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (secret / "tab" / "d.parquet").rename(blobs / "abc")
    (snapshot / "d.parquet").symlink_to("../../../blobs/abc")
    assert len(open_data(snapshot.parent, None).records) == 4


@pytest.mark.parametrize("name", ["../secret/saved/data-00000-of-00001.arrow", "{root}/secret/saved/x.arrow"])
def test_a_saved_table_names_nothing_outside(secret, name):
    state = secret / "saved" / "state.json"
    data = json.loads(state.read_text()) | {"_data_files": [{"filename": name.format(root=secret)}]}
    state.write_text(json.dumps(data))
    with pytest.raises(PmodError, match="names data outside"):
        open_data(secret / "saved", None)
    (secret / "tab" / "dataset_dict.json").write_text('{"splits": ["../secret/saved"]}')
    with pytest.raises(PmodError, match="names data outside"):
        open_data(secret / "tab", None)


def test_odd_cells_are_those_records_faults(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    whole = json.dumps([{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}])
    talks = ["[" * 100_000, "[" * 900 + "]" * 900, whole]
    images = [{"bytes": None, "path": "a\0b"}] * 3
    parquet.write_table(pa.table({"conversations": talks, "image": images}), tmp_path / "x.parquet")
    found = check_data(tmp_path / "x.parquet", None)
    assert found["counts"] == {"no conversations": 2, "missing image": 1}
