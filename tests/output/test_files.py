"""Places to write to: only what pmod wrote is replaced, as it is at that moment, by one process at a time."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from pmod_cli.output.errors import PmodError
from pmod_cli.output.files import (
    check_place,
    locked,
    open_folder,
    remove_folder,
    replacing,
    replacing_all,
    write_file,
)
from pmod_cli.output.marks import MARKER, TAG, is_ours


def make(folder, text="new"):
    with replacing(folder) as partial:
        partial.mkdir()
        (partial / "weights").write_text(text)


def tree(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_what_pmod_wrote_is_replaced_and_what_a_user_added_is_not(tmp_path):
    make(tmp_path / "out", "old")
    make(tmp_path / "out")
    assert (tmp_path / "out" / "weights").read_text() == "new"
    (tmp_path / "out" / "photo.png").write_text("a user's")
    before = tree(tmp_path)
    with pytest.raises(PmodError, match="not written by pmod"):
        make(tmp_path / "out", "newer")
    with pytest.raises(PmodError, match="not written by pmod"):
        remove_folder(tmp_path / "out")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("force", [False, True])
def test_what_appears_while_pmod_works_stays(tmp_path, force):
    def work():
        with replacing_all([tmp_path / "a.html", tmp_path / "b.md"], force=force) as [page, text]:
            page.write_text(TAG)
            text.write_text(TAG)
            (tmp_path / "b.md").write_text("a user's")

    with pytest.raises(PmodError, match="it stays as it is"):
        work()
    assert tree(tmp_path) == {"b.md": "a user's"}


def test_an_error_leaves_what_was_there(tmp_path):
    write_file(tmp_path / "a.html", TAG)

    def work():
        with replacing_all([tmp_path / "a.html", tmp_path / "b.md"]) as [page, _]:
            page.write_text("half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        work()
    assert tree(tmp_path) == {"a.html": TAG}


def test_places_that_are_never_written(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_text("a user's")
    (tmp_path / "link").symlink_to("photos")
    os.mkfifo(tmp_path / "fifo")
    make(tmp_path / "model")
    make(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    for name, why in (
        ("photos", "not written by pmod"),
        ("link", "symbolic link"),
        ("fifo", "neither a file nor a folder"),
        ("model", "an input"),
        ("here", "the working folder"),
        (".", "the working folder"),
    ):
        with pytest.raises(PmodError, match=why):
            check_place(tmp_path / name, True, [tmp_path / "model" / "weights"])
    with pytest.raises(PmodError, match="exists"):
        check_place(tmp_path / "model", False)


def test_a_folder_to_work_in_is_new_or_pmod_s_own(tmp_path):
    open_folder(tmp_path / "work", ["*.jsonl"])
    (tmp_path / "work" / "a.jsonl").write_text("")
    open_folder(tmp_path / "work", ["*.jsonl"])
    assert is_ours(tmp_path / "work")
    (tmp_path / "work" / "photo.png").write_text("a user's")
    assert not is_ours(tmp_path / "work")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "photo.png").write_text("a user's")
    with pytest.raises(PmodError, match="did not write"):
        open_folder(tmp_path / "photos", ["*"])


def test_one_writer(tmp_path):
    open_folder(tmp_path / "work", ["*"])
    with (
        locked(tmp_path / "work", tmp_path / "out"),
        pytest.raises(PmodError, match=r"another pmod is writing .*out"),
        locked(tmp_path / "work", tmp_path / "out"),
    ):
        pass
    with locked(tmp_path / "work", tmp_path / "out"):
        pass


def test_leftovers_of_a_killed_process_go_and_a_user_s_folder_of_that_name_stays(tmp_path):
    room = tmp_path / ".a.html.partial"
    room.mkdir()
    (room / MARKER).write_text(json.dumps({"workspace": room.stat().st_ino}))
    (room / "a.html").write_text("half")
    write_file(tmp_path / "a.html", TAG)
    assert tree(tmp_path) == {"a.html": TAG}
    room.mkdir()
    (room / "photo.png").write_text("a user's")
    with pytest.raises(PmodError, match="is in the way"):
        write_file(tmp_path / "a.html", TAG)
    assert tree(tmp_path) == {"a.html": TAG, ".a.html.partial/photo.png": "a user's"}


@pytest.mark.parametrize(
    "mark",
    [
        {"names": ["*"]},
        {"files": ["thesis.txt"]},
        {"files": {"thesis.txt": "00"}},
        {"files": {"thesis.txt": None}},
        {"files": {"thesis.txt": ""}},
        {"workspace": 1},
        {},
        ["*"],
    ],
)
def test_a_stranger_s_marker_gives_nothing_away(tmp_path, mark):
    for name in ("dl", ".new.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / MARKER).write_text(json.dumps(mark))
        (tmp_path / name / "thesis.txt").write_text("a user's")
    before = tree(tmp_path)
    for act in (
        lambda: make(tmp_path / "dl"),
        lambda: make(tmp_path / "new"),
        lambda: remove_folder(tmp_path / "dl"),
        lambda: write_file(tmp_path / "dl" / "thesis.txt", "new"),
        lambda: check_place(tmp_path / "dl", True, names=["*.jsonl"]),
    ):
        with pytest.raises(PmodError):
            act()
    assert tree(tmp_path) == before


def test_links_are_neither_markers_nor_workspaces_nor_written_through(tmp_path):
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("a user's")
    make(tmp_path / "model")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / MARKER).symlink_to(thesis)
    (tmp_path / ".a.partial").symlink_to("model")
    shutil.copytree(tmp_path / "model", tmp_path / ".b.partial")
    shutil.copytree(tmp_path / "model", tmp_path / "linked")
    (tmp_path / "linked" / MARKER).unlink()
    (tmp_path / "linked" / MARKER).symlink_to(tmp_path / "model" / MARKER)
    open_folder(tmp_path / "work", ["*.log", "sub"])
    (tmp_path / "work" / "sub").mkdir()
    (tmp_path / "link").symlink_to("work")
    before = tree(tmp_path)
    for act in (
        lambda: open_folder(tmp_path / "run", ["*"]),
        lambda: open_folder(tmp_path / "link", ["*.log"]),
        lambda: make(tmp_path / "a"),
        lambda: make(tmp_path / "b"),
        lambda: make(tmp_path / "linked"),
    ):
        with pytest.raises(PmodError):
            act()
    for name in ("error.log", "sub/samples"):
        (tmp_path / "work" / name).symlink_to(thesis)
        with pytest.raises(PmodError, match=f"{name} is a link"):
            open_folder(tmp_path / "work", ["*.log", "sub"])
        (tmp_path / "work" / name).unlink()
    (tmp_path / "work" / "mine").symlink_to(thesis)  # not of a name of pmod's
    open_folder(tmp_path / "work", ["*.log", "sub"])
    (tmp_path / "work" / "mine").unlink()
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "change", [lambda out: (out / "sub").mkdir(), lambda out: (out / "weights").write_text("?")]
)
def test_a_finished_folder_with_a_folder_or_an_edit_of_the_user_s_stays(tmp_path, change):
    make(tmp_path / "out")
    change(tmp_path / "out")
    with pytest.raises(PmodError, match="not written by pmod"):
        make(tmp_path / "out")


def test_a_workspace_that_cannot_be_used_leaves_nothing(tmp_path):
    if not os.getuid():
        pytest.skip("root may do everything")
    before = os.umask(0o777)
    try:
        with pytest.raises(PermissionError):
            write_file(tmp_path / "a.html", TAG)
    finally:
        os.umask(before)
    assert not list(tmp_path.iterdir())
