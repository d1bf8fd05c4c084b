"""Tables that processes share: what they hold, when they are made, and that nothing depends on them."""

from __future__ import annotations

import json
import logging
import multiprocessing
import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from pmod_cli.data import dataset, records
from pmod_cli.data.batches import OrderedSampler
from pmod_cli.data.dataset import open_data
from pmod_cli.data.records import Conversation, Turn, parse_record, read_records
from pmod_cli.data.table import Shapes
from pmod_cli.output.errors import PmodError


def turns(question="<image>\nWhat?", answer="red"):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


RECORDS = [
    {"id": "a", "image": "a.png", "conversations": turns()},
    {"id": "a", "conversations": turns("Hällo \u2028 you?")},
    {"id": "\ud83d", "image": ["\udc00.png", "b.png"], "conversations": turns("<image><image>Alike?", "Ja.")},
    {"id": 7, "conversations": turns(answer="")},
    "no record",
    {"conversations": turns("Hello?"), "weight": [1.5, None, {"deep": True}]},
]


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Every table is kept, in this folder."""
    monkeypatch.setenv("PMOD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dataset, "_KEPT_FROM", 0)
    return tmp_path / "cache" / "data"


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(RECORDS))
    (tmp_path / "images").mkdir()
    return path, tmp_path / "images"


@pytest.mark.parametrize("again", ["new", "opened", "pickled"])
def test_a_table_holds_what_the_file_does(data, kept, again):
    source = open_data(*data)
    if again == "opened":
        source = open_data(*data)
    if again == "pickled":
        source = pickle.loads(pickle.dumps(source))
    assert list(source.records) == RECORDS
    assert source.records[1:3] == RECORDS[1:3]
    assert source.records[::-2] == RECORDS[::-2]
    assert list(source.samples) == [
        Conversation("a", ("a.png",), (Turn("user", "<image>\nWhat?"), Turn("assistant", "red"))),
        Conversation("a (record 1)", (), (Turn("user", "Hällo \u2028 you?"), Turn("assistant", "red"))),
        Conversation(
            "\ud83d",
            ("\udc00.png", "b.png"),
            (Turn("user", "<image><image>Alike?"), Turn("assistant", "Ja.")),
        ),
        Conversation("5", (), (Turn("user", "Hello?"), Turn("assistant", "red"))),
    ]
    assert source.bad == {"7": "empty answer", "4": "not a record: a str"}
    plain = Shapes.of(list(source.samples))
    for name, array in vars(source.samples.shapes).items():
        assert array.tolist() == getattr(plain, name).tolist()
    assert len(list(kept.glob("*.arrow"))) == 1


def test_a_table_is_kept_until_the_file_changes(data, kept):
    open_data(*data)
    [table] = kept.glob("*.arrow")
    made = table.stat().st_mtime_ns
    open_data(*data)
    assert table.stat().st_mtime_ns == made
    table.write_bytes(table.read_bytes()[:-100])
    assert list(open_data(*data).records) == RECORDS  # one that is not whole is made anew
    assert table.stat().st_mtime_ns != made
    data[0].write_text(json.dumps(RECORDS[:1]))
    assert len(open_data(*data).records) == 1
    assert len(list(kept.glob("*.arrow"))) == 2


def test_small_files_leave_nothing_behind(data, tmp_path, monkeypatch):
    monkeypatch.setenv("PMOD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    source = open_data(*data)
    assert list(source.records) == RECORDS
    del source
    assert not (tmp_path / "cache").exists()
    assert not list(tmp_path.glob("pmod-*"))


def test_a_cache_that_cannot_be_written_costs_no_run(data, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(dataset, "_KEPT_FROM", 0)
    (tmp_path / "file").touch()
    monkeypatch.setenv("PMOD_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert list(open_data(*data).records) == RECORDS
    assert "PMOD_CACHE names another folder" in caplog.text


def _open(data, results):
    results.put(list(open_data(*data).records) == RECORDS)


def test_eight_processes_make_one_table(data, kept, tmp_path, monkeypatch):
    log = tmp_path / "made.log"

    def noted(path):
        with log.open("a") as file:
            file.write("made\n")
        yield from read_records(path)

    monkeypatch.setattr(dataset, "read_records", noted)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_open, args=(data, results)) for _ in range(8)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [True] * 8
    for process in processes:
        process.join()
    assert log.read_text() == "made\n"
    assert len(list(kept.glob("*.arrow"))) == 1


def test_a_table_of_rows_is_kept_until_its_files_change(tmp_path, kept):
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    features = Features(
        {
            "image": ImageFeature(),
            "conversations": List({"from": Value("string"), "value": Value("string")}),
        }
    )
    for answers in (["red", "blue"], ["red", "green", "blue"]):
        rows = {
            "image": [None] * len(answers),
            "conversations": [turns("Colour?", answer) for answer in answers],
        }
        Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "table"))
        first, again = (open_data(tmp_path / "table", None) for _ in range(2))
        assert [sample.turns[1].text for sample in again.samples] == answers
        assert first.fingerprint == again.fingerprint
    assert len(list(kept.glob("*.arrow"))) == 2


@pytest.mark.parametrize("window", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    "text",
    [
        "[]x",
        '[{"a": [1, 2.5e3, "\\u2028 \\"]"]}, 12, -3.25 , null,"ü\u2029x"]',
        ' [\n1234567890123\r\n,\t{"b": {}} ]\n ',
        "[1 2]",
        "[1,]",
        "[1, 2",
        '["open',
        "[1] 2",
        "[,1]",
        '[1, {"a": nope}, 3]',
        "[NaN, Infinity]",
    ],
)
def test_a_list_is_read_as_json_reads_it(tmp_path, monkeypatch, window, text):
    monkeypatch.setattr(records, "_WINDOW", window)
    path = tmp_path / "data.json"
    path.write_text(text, encoding="utf-8")
    try:
        expected = json.loads(text)
    except ValueError:
        with pytest.raises(PmodError, match=r"data.json (is not valid JSON: record \d|holds no records)"):
            list(read_records(path))
    else:
        found = list(read_records(path))
        assert repr([value for _, value in found]) == repr(expected)
        assert repr([json.loads(part) for part, _ in found]) == repr(expected)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"id": 1}, {"id": }]', "a.json is not valid JSON: record 1: Expecting value"),
        ("a.jsonl", b'{"id": 1}\n{"id"\n', "a.jsonl is not valid JSON: record 1: Expecting"),
        ("a.json", b'[{"id": 1}, "\xff"]', "cannot read .*a.json: after . records: .*utf-8"),
        ("a.json", b"[0, " + b"[" * 200_000, "a.json is not valid JSON: record 1: "),
        ("a.json", b'{"id": 1}\n{"id": 2}', "a.json is not a list of records"),
        ("a.jsonl", b"\n\n", "a.jsonl holds no records"),
    ],
)
def test_errors_name_file_and_record(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PmodError, match=message):
        open_data(tmp_path / name, None)


def test_reading_takes_no_multiple_of_the_file(tmp_path):
    path = tmp_path / "data.json"
    record = json.dumps({"conversations": turns("Hello?", "word " * 20_000)})
    path.write_text("[" + ",\n".join([record] * 120) + "]")
    size = path.stat().st_size
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_records(path)) == 120
        assert tracemalloc.get_traced_memory()[1] < size * 0.6
    finally:
        tracemalloc.stop()


def _old_order(samples, seed, epoch, group):
    """As it was before there were tables; runs that began then are resumed."""
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    if group is None:
        return torch.randperm(len(samples), generator=generator).tolist()
    lengths = [sum(len(turn.words) for turn in sample.turns) for sample in samples]
    batches, rest = [], []
    for with_images in (True, False):
        those = [index for index, sample in enumerate(samples) if bool(sample.images) == with_images]
        shuffled = [those[i] for i in torch.randperm(len(those), generator=generator).tolist()]
        for start in range(0, len(shuffled), group * 50):
            mega = shuffled[start : start + group * 50]
            mega.sort(key=lambda index: -lengths[index])
            for first in range(0, len(mega), group):
                batch = mega[first : first + group]
                if len(batch) == group:
                    batches.append(batch)
                else:
                    rest += batch
    order = torch.randperm(len(batches), generator=generator).tolist()
    return [index for i in order for index in batches[i]] + rest


@pytest.mark.parametrize("group", [None, 1, 3, 8])
@pytest.mark.parametrize("pictures", [0, 2, 3])
def test_the_order_is_what_it_was(tmp_path, group, pictures):
    rng = np.random.default_rng(pictures)
    made = []
    for _ in range(1003):
        image = pictures and int(rng.integers(pictures))  # none, some, or two in three
        question = ("<image>\n" if image else "") + "w" * int(rng.integers(1, 12))  # many of one length
        made.append({"conversations": turns(question)} | ({"image": "a.png"} if image else {}))
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, made)))
    plain = [parse_record(record, index) for index, record in enumerate(made)]
    source = open_data(tmp_path / "data.jsonl", tmp_path)
    assert list(source.samples) == plain
    for samples in (source.samples, plain):
        sampler = OrderedSampler(samples, 5, group)
        for epoch in (0, 2):
            sampler.set_epoch(epoch)
            order = list(sampler)
            assert order == _old_order(plain, 5, epoch, group)
            assert {type(index) for index in order} == {int}


def test_listed_folders_say_what_looks_at_files_do(tmp_path, monkeypatch):
    images = tmp_path / "images"
    (images / "deep").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(images / "deep" / "a.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "outside.png")
    (images / "out.png").symlink_to(tmp_path / "outside.png")
    (images / "in.png").symlink_to(images / "deep" / "a.png")
    (images / "linked").symlink_to(images / "deep")
    names = ["deep/a.png", "deep/b.png", "none/a.png", "linked/a.png", "in.png", "out.png", "../outside.png"]
    names += [
        str(images / "deep" / "a.png"),
        "/etc/hostname",
        "a\0b.png",
        "deep",
        "http://x/a.png",
        "./deep/a.png",
    ]
    made = [{"id": name, "image": name, "conversations": turns()} for name in names]
    (tmp_path / "data.json").write_text(json.dumps(made))
    found = []
    for least in (10_000, 0):
        monkeypatch.setattr(dataset, "_LISTED_FROM", least)
        found.append(open_data(tmp_path / "data.json", images).missing_images())
    assert found[0] == found[1]
    good = ("deep/a.png", "linked/a.png", "in.png", str(images / "deep" / "a.png"), "deep", "./deep/a.png")
    assert sorted(found[0]) == sorted(set(names) - set(good))
