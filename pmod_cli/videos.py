"""The one way to open a video: some of its frames, upright, and when they are shown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pmod_cli.extras import require
from pmod_cli.output.errors import PmodError, first_line
from pmod_cli.output.reading import check_regular
from pmod_cli.pictures import is_url

FRAMES = 32
"""How many frames of a video are seen, as LLaVA-OneVision's own evaluation has it."""

_LARGEST = 1 << 30  # bytes of the frames of one video

_FORMATS = (
    "matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,avi,flv,live_flv,asf,mpeg,mpegts,mpegvideo,m4v,ogg,h264,hevc,ivf,obu,"
    "yuv4mpegpipe,gif,apng,nut,rm,wtv,dv,mxf,gxf"
)
"""FFmpeg's names of formats that hold a video; others name files, draw, or wait for a network."""

_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".3gp")


@dataclass(frozen=True, eq=False)
class Video:
    """Frames of a video.

    Attributes:
        frames: RGB, [frames, height, width, 3], uint8.
        indices: The number of each frame in the video; as many as there are by default.
        total: Frames of the whole video; those that are there by default.
        fps: Frames per second of the whole video; 24 if it is unknown, as transformers has it.
    """

    frames: np.ndarray
    indices: tuple[int, ...] = ()
    total: int = 0
    fps: float = 24.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "indices", self.indices or tuple(range(len(self.frames))))
        object.__setattr__(self, "total", self.total or len(self.frames))

    @property
    def metadata(self) -> dict[str, Any]:
        """What transformers' video processors are told, for the times that some write between the frames."""
        return {
            "total_num_frames": self.total,
            "fps": self.fps,
            "duration": self.total / self.fps,
            "frames_indices": list(self.indices),
        }


def is_video(name: object) -> bool:
    """Whether a file is a video, by its suffix."""
    return str(name).lower().endswith(_SUFFIXES)


def open_video(path: str | Path, frames: int = FRAMES) -> Video:
    """So many frames of a video, evenly spaced from the first to the last, upright.

    A video with fewer shows some twice, so that all have as many and go into one batch. A playlist or another file
    that names files is no video: what it names is not opened.

    Raises:
        PmodError: It cannot be read, or the frames would take more than 1 GiB.
        MissingExtraError: PyAV is not installed.
    """
    require("av")
    if is_url(path):
        raise PmodError(f"cannot read video {path}: a URL", "videos are read from files; download it first")
    file = Path(path)
    if not file.exists():
        raise PmodError(f"no video file {path}", "check the path")
    try:
        check_regular(file)
        with _opened(file) as container:
            if not container.streams.video:
                raise PmodError(f"cannot read video {path}: there is no picture in it")
            stream = container.streams.video[0]
            if stream.codec_context is None:  # PyAV would crash
                raise PmodError(f"cannot read video {path}: no decoder knows its format")
            total = sum(packet.dts is not None for packet in container.demux(video=0))
            rate = stream.average_rate
            _check_size(path, frames, stream.codec_context.width, stream.codec_context.height)
        wanted = np.linspace(0, total - 1, frames, dtype=int).tolist()
        seen, shown = np.empty((0, 0, 0, 3), np.uint8), 0
        with _opened(file) as container:
            container.streams.video[0].thread_type = "AUTO"
            for number, frame in enumerate(container.decode(video=0)):
                if count := wanted.count(number):
                    _check_size(path, frames, frame.width, frame.height)
                    turns = round(getattr(frame, "rotation", 0) / 90)
                    picture = np.rot90(frame.to_ndarray(format="rgb24"), turns)
                    if not shown:
                        seen = np.empty((frames, *picture.shape), np.uint8)
                    seen[shown : shown + count] = picture
                    shown += count
    except PmodError:
        raise
    except Exception as error:  # FFmpeg raises whatever a broken file leads it into
        raise PmodError(f"cannot read video {path}: {first_line(error)}") from error
    if not shown:
        raise PmodError(f"cannot read video {path}: there is no frame in it")
    seen[shown:] = seen[shown - 1]
    return Video(seen, tuple(wanted), total, float(rate or Video.fps))


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A container of PyAV's; FFmpeg gets the open file and no way to open another, which playlists would have it do."""
    import av

    options = {"protocol_whitelist": "none", "format_whitelist": _FORMATS}
    with file.open("rb") as stream:
        try:
            container = av.open(stream, options=options)
        except (ValueError, av.FFmpegError):  # whose words are of sockets and devices
            what = "it is none in a format that is read here, or broken"
            raise PmodError(f"cannot read video {file}: {what}") from None
        with container:
            yield container


def _check_size(path: object, frames: int, width: int, height: int) -> None:
    if (size := 3 * frames * width * height) > _LARGEST:
        raise PmodError(
            f"cannot read video {path}: {frames} frames of {width} x {height} take {size / 2**30:.1f} GiB",
            "take fewer, or scale it down",
        )
