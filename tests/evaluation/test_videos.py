"""Tasks that show videos: seen by the family that takes them, refused for others before a model is loaded."""

from __future__ import annotations

import os

import numpy as np
import pytest

from pmod_cli import videos
from pmod_cli.evaluation.evaluate import evaluate
from pmod_cli.evaluation.options import EvalSettings
from pmod_cli.evaluation.requirements import PreflightError
from pmod_cli.evaluation.tasks import write_task
from pmod_cli.generation import VisionLanguageModel
from pmod_cli.output.errors import PmodError
from pmod_cli.prompts import Prompt
from pmod_cli.videos import FRAMES, Video, open_video
from tests.common import onevision_models
from tests.common.eval_models import write_questions
from tests.common.videos import write_video

pytest.importorskip("av")
SETTINGS = EvalSettings(max_new_tokens=3, batch_size=2)


@pytest.mark.parametrize("frames", [5, 40])
def test_frames_are_evenly_spaced_from_the_first_to_the_last(tmp_path, frames):
    video = open_video(write_video(tmp_path / "clip.mkv", frames))
    assert video.frames.shape == (FRAMES, 32, 48, 3)
    expected = np.linspace(0, frames - 1, FRAMES, dtype=int)
    assert np.abs(video.frames.mean((1, 2, 3)) - 5 * expected).max() < 1
    assert (video.indices, video.total, video.fps) == (tuple(expected), frames, 10)
    assert open_video(tmp_path / "clip.mkv", 3).indices == (0, (frames - 1) // 2, frames - 1)


def test_a_broken_video_is_one_line(tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"no video")
    with pytest.raises(PmodError, match=r"clip.mp4: it is none in a format"):
        open_video(tmp_path / "clip.mp4")
    with pytest.raises(PmodError, match=r"no video file .*other.mp4"):
        open_video(tmp_path / "other.mp4")
    with pytest.raises(PmodError, match=r"a URL"):
        open_video("https://example.org/clip.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(PmodError, match="not a regular file"):
        open_video(tmp_path / "pipe.mp4")


@pytest.mark.parametrize(
    ("name", "playlist"),
    [
        ("clip.mp4", "ffconcat version 1.0\nfile {name}\n"),
        ("clip.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:8.0,\n{name}\n"),
    ],
)
def test_a_playlist_opens_no_other_file(tmp_path, name, playlist):
    """FFmpeg would show the video that it names."""
    named = write_video(tmp_path / "secret.mkv", 3).rename(tmp_path / "secret.ts")
    clip = tmp_path / name
    clip.write_text(playlist.format(name=named.name))
    with pytest.raises(PmodError, match=rf"{name}: it is none in a format"):
        open_video(clip)


def test_frames_that_would_not_fit_in_memory_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(videos, "_LARGEST", 32 * 48 * 3 * 10)
    clip = write_video(tmp_path / "clip.mkv", 4)
    assert len(open_video(clip, 10).frames) == 10
    with pytest.raises(PmodError, match="11 frames of 48 x 32 take"):
        open_video(clip, 11)


@pytest.fixture(scope="module")
def video_task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    paths = [str(write_video(folder / f"{number}.mkv", 4 + number)) for number in range(3)]
    write_questions(folder / "data", paths)  # the answers name the videos
    path = write_task(folder, "clips", folder / "data")
    (folder / "utils.py").write_text("def visual(doc):\n    return doc['answer']\n")
    path.write_text(path.read_text() + "doc_to_visual: !function utils.visual\n")
    return folder


def test_a_family_without_videos_is_refused_before_it_is_loaded(llava, video_task, monkeypatch):
    monkeypatch.setattr(VisionLanguageModel, "load", None)
    with pytest.raises(PreflightError, match="clips: shows videos, and a llava takes none"):
        evaluate(llava, ["clips"], include_path=video_task, settings=SETTINGS)


def test_what_no_family_takes_is_refused(llava, video_task, tmp_path):
    path = write_task(tmp_path, "sounds", video_task / "data")
    (tmp_path / "utils.py").write_text("def visual(doc):\n    return [{'array': [0.0]}]\n")
    path.write_text(path.read_text() + "doc_to_visual: !function utils.visual\n")
    with pytest.raises(PreflightError, match="sounds: shows a dict"):
        evaluate(llava, ["sounds"], include_path=tmp_path, settings=SETTINGS)


def test_onevision_sees_them(video_task):
    model = VisionLanguageModel(onevision_models.pmod_model(), onevision_models.processor())
    seen = []
    generate = model.generate
    model.generate = lambda prompts, **settings: seen.extend(prompts) or generate(prompts, **settings)
    result = evaluate(model, ["clips"], include_path=video_task, settings=SETTINGS)
    assert result.failed_samples == 0, result.first_failure
    greys = [5 * np.linspace(0, frames - 1, FRAMES, dtype=int).mean() for frames in (4, 5, 6)]
    assert sorted(prompt.videos[0].frames.mean() for prompt in seen) == pytest.approx(greys)
    for prompt in seen:
        inputs = model.encode([prompt])
        assert inputs["input_ids"].shape[1] == model.length(prompt)
        assert int((inputs["input_ids"] == onevision_models.VIDEO).sum()) == FRAMES * 4 + 1


def test_videos_stand_where_the_text_has_them():
    model = VisionLanguageModel(onevision_models.pmod_model(), onevision_models.processor())
    clip = Video(onevision_models.video(4))
    asked = Prompt("w5 <video> w6 <image> w7", (onevision_models.picture(13, 13),), (clip,))
    assert model.render(asked) == "w5 <video> w6 <image> w7"
    [answer] = model.generate([asked], max_new_tokens=2)
    assert answer.prompt_tokens == model.length(asked)
    with pytest.raises(PmodError, match="2 <video> and 1 videos"):
        Prompt("<video> <video>", (), (clip,))
