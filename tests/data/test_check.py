"""Everything that `pmod data check` finds."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from pmod_cli.data.check import check_data
from pmod_cli.data.pictures import decode
from pmod_cli.data.records import BadSample
from pmod_cli.output.errors import PmodError


def turns(question="<image>\nWhat?", answer="A dot.", first="human"):
    return [{"from": first, "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (80, 80)).save(images / "good.png")
    (images / "empty.png").touch()
    (images / "text.png").write_text("not a picture")
    (images / "cut.png").write_bytes((images / "good.png").read_bytes()[:60])
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    (images / "link.png").symlink_to(tmp_path / "outside.png")
    (images / "loop.png").symlink_to(images / "loop.png")
    return images


CASES = [
    ("missing image", {"image": "none.png", "conversations": turns()}),
    ("empty image", {"image": "empty.png", "conversations": turns()}),
    ("unreadable image", {"image": "text.png", "conversations": turns()}),
    ("unreadable image", {"image": "cut.png", "conversations": turns()}),
    ("path leaves the folder", {"image": "../outside.png", "conversations": turns()}),
    ("path leaves the folder", {"image": "/etc/hostname", "conversations": turns()}),
    ("path leaves the folder", {"image": "link.png", "conversations": turns()}),
    ("missing image", {"image": "a\0b.png", "conversations": turns()}),
    ("unreadable image", {"image": "a" * 300 + ".png", "conversations": turns()}),
    ("unreadable image", {"image": ".", "conversations": turns()}),
    ("unreadable image", {"image": "loop.png", "conversations": turns()}),
    ("<image> count", {"image": "good.png", "conversations": turns("What?")}),
    ("<image> count", {"conversations": turns()}),
    ("<image> count", {"image": ["good.png", "good.png"], "conversations": turns()}),
    ("<image> count", {"image": "good.png", "conversations": turns("What?", "A <image>.")}),
    ("empty answer", {"image": "good.png", "conversations": turns(answer=" ")}),
    ("unknown role", {"image": "good.png", "conversations": turns(first="robot")}),
    ("turns out of order", {"conversations": turns("What?")[::-1]}),
    ("turns out of order", {"conversations": turns("What?")[:1]}),
    ("no conversations", {"id": 3}),
    ("unknown role", {"conversations": turns("What?", first=["human"])}),
    ("bad turn", {"conversations": [{"from": "human"}]}),
    ("bad turn", {"conversations": turns("\ud83d What?")}),
    ("bad turn", {"conversations": turns("What?" * 10**6)}),
    ("bad image field", {"image": 3, "conversations": turns()}),
    ("not a record", "text"),
    ("too long", {"image": "good.png", "conversations": turns("<image> " + "What? " * 200)}),
]
GOOD = [
    {"id": "a", "image": "good.png", "conversations": turns()},
    {"id": "b", "image": ["good.png", "good.png"], "conversations": turns("<image> <image> Alike?")},
    {"id": "c", "conversations": turns("Hello?")},
]


@pytest.mark.parametrize(("kind", "record"), CASES)
def test_each_kind(tmp_path, folder, processor, kind, record, monkeypatch):
    # As lmms-eval leaves it, where it was imported before: a picture that is cut short is still found.
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)
    data = tmp_path / "data.json"
    data.write_text(json.dumps([*GOOD, record]))
    report = check_data(data, folder, processor=processor, max_length=300)
    assert report["counts"] == {kind: 1}
    assert report["problems"][0]["index"] == 3
    assert (report["good"], report["with_images"]) == (3, 2)
    assert report["longest_tokens"] is not None
    assert 200 < report["longest_tokens"] <= 300


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_duplicates_and_fix(tmp_path, folder, suffix):
    data, clean = tmp_path / f"data.{suffix}", tmp_path / f"clean.{suffix}"
    # U+2028 ends a line for Python, not for JSON.
    records = [*GOOD, {**GOOD[0], "id": "again"}, CASES[0][1], {"conversations": turns("One\u2028two?")}]
    lines = "\n".join(map(json.dumps, records))
    data.write_text(lines if suffix == "jsonl" else json.dumps(records))
    report = check_data(data, folder, fix=clean)
    assert report["counts"] == {"duplicate": 1, "missing image": 1}
    again = check_data(clean, folder)
    assert (again["records"], again["problems"]) == (4, [])
    with pytest.raises(PmodError, match="exists"):
        check_data(data, folder, fix=clean)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{}", "not a list"), ("[", "not valid JSON"), ("[]", "holds no records")],
)
def test_files_that_are_none(tmp_path, text, message):
    data = tmp_path / "data.json"
    data.write_text(text)
    with pytest.raises(PmodError, match=message):
        check_data(data, tmp_path)
    with pytest.raises(PmodError, match="no data file"):
        check_data(tmp_path / "none.json", tmp_path)


def test_a_place_that_cannot_be_written_is_known_at_once(tmp_path, folder):
    data = tmp_path / "data.json"
    data.write_text(json.dumps(GOOD))

    def never(done, total):
        pytest.fail("the check has begun")

    for place, message in ((data / "clean.json", "is a file"), (folder, "is a folder")):
        with pytest.raises(PmodError, match=message):
            check_data(data, folder, fix=place, force=True, progress=never)


def test_pillow_fills_up_cut_pictures_if_it_is_told_to(folder, monkeypatch):
    """What `refuse_cut_pictures` is for; Pillow 10.1 to 12."""
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)
    Image.open(folder / "cut.png").load()
    with pytest.raises(BadSample, match="unreadable image"):
        decode((folder / "cut.png").read_bytes(), "cut.png")


def test_many_at_once_find_what_one_at_a_time_does(tmp_path, folder, processor, monkeypatch):
    """All kinds in one file, in chunks of three: in the file's order, duplicates known across chunks."""
    monkeypatch.setattr("pmod_cli.data.check._CHUNK", 3)
    records = [*GOOD, *(record for _, record in CASES), *GOOD]
    data = tmp_path / "data.json"
    data.write_text(json.dumps(records))
    done = []
    report = check_data(
        data, folder, processor=processor, max_length=300, progress=lambda *step: done.append(step)
    )
    kinds = [kind for kind, _ in CASES] + ["duplicate"] * 3
    assert [(found["index"], found["kind"]) for found in report["problems"]] == list(enumerate(kinds, 3))
    assert (report["good"], done[-1]) == (3, (len(records), len(records)))
    assert report["notes"] == {"picture suspicious: a single colour": 1}  # one picture, four times
