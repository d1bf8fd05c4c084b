"""What is read of a record, what is reported, and where its pictures stand."""

from __future__ import annotations

import datetime
import json

import pytest
from PIL import Image

from pmod_cli.data.chat import ChatEncoder
from pmod_cli.data.check import check_data
from pmod_cli.data.dataset import open_data
from pmod_cli.data.records import BadSample, Turn, parse_record
from pmod_cli.output.errors import PmodError
from pmod_cli.output.paths import cache_folder
from pmod_cli.training.preflight import check_data_fits

PLACES = "Before: <image>\nAfter: <image>\nWhich is red?"


def turns(question="<image>\nWhat?", answer="red"):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        picture = Image.new("RGB", (80, 80), colour)
        picture.putpixel((3, 3), (0, 255, 0))
        picture.save(images / name)
    return images


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85"])
@pytest.mark.parametrize("suffix", ["json", "jsonl", "JSONL"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_only_line_feeds_end_a_line(tmp_path, folder, character, suffix, start):
    records = [{"id": str(k), "conversations": turns(f"One{character}two {k}")} for k in range(3)]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    text = json.dumps(records, ensure_ascii=False) if suffix == "json" else "\r\n".join(lines)
    (tmp_path / f"data.{suffix}").write_text(start + text, encoding="utf-8", newline="")
    report = check_data(tmp_path / f"data.{suffix}", folder, fix=tmp_path / "clean.jsonl")
    assert (report["records"], report["good"]) == (3, 3)
    written = (tmp_path / "clean.jsonl").read_text(encoding="utf-8")
    assert len(written.splitlines()) == 3
    assert [json.loads(line) for line in written.splitlines()] == records
    assert check_data(tmp_path / "clean.jsonl", folder)["good"] == 3


def test_half_of_a_surrogate_pair_in_a_key_that_is_not_read_can_be_written(tmp_path, folder):
    (tmp_path / "data.json").write_text(json.dumps([{"note": "\ud83d", "conversations": turns("Hello?")}]))
    report = check_data(tmp_path / "data.json", folder, fix=tmp_path / "clean.json")
    assert report["notes"] == {"key note is not read": 1}
    assert json.loads((tmp_path / "clean.json").read_text())[0]["note"] == "\ud83d"


@pytest.mark.parametrize("name", ["same", None])
def test_ids_are_labels(tmp_path, folder, name):
    records = [{"id": "good", "image": "a.png", "conversations": turns()}]
    records += [{"id": name, "image": f"gone{k}.png", "conversations": turns()} for k in range(40)]
    records += [{"id": name, "conversations": turns(answer="")} for _ in range(3)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    data = open_data(tmp_path / "data.json", folder)
    assert (len(data.missing_images()), len(data.bad)) == (40, 3)
    with pytest.raises(PmodError, match=r"43 samples cannot be used \(train.max_bad_samples is 5\)"):
        check_data_fits(data, 5)


def test_other_names_of_what_is_read():
    talk = turns()
    expected = parse_record({"id": "1", "image": "a.png", "conversations": talk}, 0)
    spoken = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "red"}]
    for other in (
        {"images": ["a.png"], "conversations": talk},
        {"image": "a.png", "conversations": spoken},
        {"images": ["a.png"], "messages": spoken},
    ):
        assert parse_record({"id": "1", **other}, 0) == expected
    image, text = {"type": "image"}, {"type": "text", "text": "\nWhat?"}
    named = [image | {"image": "a.png"}, image | {"url": "a.png"}]
    named += [{"type": "image_url", "image_url": {"url": "a.png"}}]
    records = [{"image": "a.png", "messages": [{"role": "user", "content": [image, text]}, spoken[1]]}]
    records += [{"messages": [{"role": "user", "content": [part, text]}, spoken[1]]} for part in named]
    assert [parse_record({"id": "1", **record}, 0) for record in records] == [expected] * 4
    led = parse_record({"system": "Be short.", "conversations": turns("Hello?")}, 0)
    assert led.turns[0] == Turn("system", "Be short.")


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        ({"video": "clip.mp4", "conversations": turns("<video>\nWhat?")}, "other media"),
        ({"video": "clip.mp4", "conversations": turns("<image>\nWhat?")}, "other media"),
        ({"img": "a.png", "conversations": turns("What?")}, "other media"),
        ({"image_path": "a.png", "conversations": turns()}, "other media"),
        ({"frames": ["a.JPG"], "conversations": turns("What?")}, "other media"),
        (
            {"conversations": [{"from": "human", "value": "What?", "picture": "a.png"}, turns()[1]]},
            "other media",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]}, "other media"),
        ({"images": ["a.png"], "conversations": turns("What?")}, "<image> count"),
        ({"image": "a.png", "images": ["b.png"], "conversations": turns()}, "bad image field"),
    ],
)
def test_pictures_and_videos_are_never_dropped(record, kind):
    with pytest.raises(BadSample) as error:
        parse_record(record, 0)
    assert error.value.kind == kind


def test_check_reports_keys_conversions_and_addresses(tmp_path, folder):
    Image.new("RGBA", (80, 80), (0, 0, 0, 0)).save(folder / "clear.png")
    records = [
        {"image": "clear.png", "weight": 0.5, "conversations": turns()},
        {"image": str(folder / "a.png"), "conversations": turns()},
        {"image": "https://example.org/a.png", "conversations": turns()},
        {"messages": [{"role": "user", "content": "Other."}], "conversations": turns("<video>\nWhat?")},
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    report = check_data(tmp_path / "data.json", folder)
    assert report["good"] == 3
    assert report["counts"] == {"URL": 1}
    assert report["notes"] == {
        "picture transparency laid on white": 1,
        "picture suspicious: a single colour": 1,
        "key weight is not read": 1,
        "key messages is not read": 1,
        "<video> is text, and shows none": 1,
    }


def test_pictures_stay_where_they_are_written(processor):
    encoder = ChatEncoder(processor, 2048)
    text, _ = encoder.render([Turn("user", PLACES), Turn("assistant", "Before")])
    assert PLACES in text
    single = [Turn("user", "What colour? <image>"), Turn("assistant", "red")]
    assert "What colour? <image> " in encoder.render(single)[0]
    front = ChatEncoder(processor, 2048, "front")
    assert front.moves(single)
    assert "<image>\nWhat colour? " in front.render(single)[0]
    assert PLACES in front.render([Turn("user", PLACES), Turn("assistant", "Before")])[0]


def test_special_tokens_in_what_people_wrote(processor):
    encoder = ChatEncoder(processor, 2048)
    eos = processor.tokenizer.eos_token
    once = encoder.encode([Turn("user", "What?"), Turn("assistant", "red")], [])
    assert encoder.encode([Turn("user", "What?"), Turn("assistant", f"red{eos}")], []) == once
    asked = encoder.encode([Turn("user", f"What is {eos}?"), Turn("assistant", "red")], [])
    assert asked.input_ids.count(processor.tokenizer.eos_token_id) == 1


def test_an_answers_indentation_is_kept():
    record = {"conversations": turns("Code?", "\n\n    return 1\nend\n")}
    assert parse_record(record, 0).turns[1].text == "    return 1\nend"


@pytest.mark.parametrize("layout", ["struct", "bytes"])
def test_parquet_without_datasets_features(tmp_path, folder, layout):
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = (folder / "a.png").read_bytes()
    cell = {"bytes": content, "path": "a.png"} if layout == "struct" else content
    columns = {
        "image": [cell],
        "conversations": [json.dumps(turns())],
        "made": [datetime.datetime(2024, 1, 1)],
    }
    pq.write_table(pa.table(columns), tmp_path / "data.parquet")
    data = open_data(tmp_path / "data.parquet", None)
    [sample] = data.samples
    assert data.pictures.load(sample.images[0]).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("depth", [90, 900, 100_000])
def test_lists_in_lists_are_one_line(tmp_path, depth):
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"extra": {"[" * depth}{"]" * depth}, "conversations": {json.dumps(turns("Why?"))}}}')
    if depth < 100:
        assert check_data(path, None)["good"] == 1
    else:
        with pytest.raises(PmodError, match="not valid JSON: record 0"):
            check_data(path, None)


def test_a_user_without_a_home_keeps_tables_for_the_process(monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME", "PMOD_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 4_000_000_000)
    assert cache_folder().is_dir()
    monkeypatch.setenv("HOME", "/nowhere")
    assert str(cache_folder()) == "/nowhere/.cache/pmod"
