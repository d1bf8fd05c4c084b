"""Videos that the tests write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def write_video(path: Path, frames: int) -> Path:
    """A video of 10 frames a second, whose frame n has the grey value 5 n."""
    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "bgr0"
        for number in range(frames):
            grey = np.full((32, 48, 3), 5 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())
    return path
