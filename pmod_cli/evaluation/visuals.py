"""What the tasks show: pictures and videos, as their `doc_to_visual` gives them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from PIL import Image

from pmod_cli.evaluation.requirements import PreflightError, Problem
from pmod_cli.families import Family, families_with_videos
from pmod_cli.pictures import as_rgb, open_image
from pmod_cli.prompts import Prompt
from pmod_cli.videos import Video, is_video, open_video


def prompt_of(text: str, doc_to_visual: Callable[[Any], Any], doc: Any) -> Prompt:
    """A document's prompt, with what its task shows of it."""
    images, videos = [], []
    for visual in _visuals(doc_to_visual, doc):
        if _is_video(visual):
            videos.append(open_video(visual) if isinstance(visual, str) else Video(visual))
        else:
            images.append(open_image(visual) if isinstance(visual, str) else visual)
    return Prompt(text, tuple(images), tuple(videos))


def refuse_unseen(tasks: Mapping[str, Any], families: Iterable[Family]) -> None:
    """Look at the first document of each loaded task, before a model is.

    Raises:
        PreflightError: It shows a video, and one of the families takes none; or what no family takes.
    """
    blind = [family.base_type for family in families if not family.videos]
    problems = [problem for leaf, task in tasks.items() for problem in _unseen(leaf, task, blind)]
    if problems:
        raise PreflightError(problems)


def _unseen(leaf: str, task: Any, blind: list[str]) -> Iterator[Problem]:
    try:
        shown = _visuals(task.doc_to_visual, task.eval_docs[0])
    except Exception:  # each sample's error is noted when its turn comes
        return
    for visual in shown:
        if _is_video(visual):
            if blind:
                yield Problem(leaf, f"shows videos, and a {blind[0]} takes none", families_with_videos())
                return
        elif not isinstance(visual, (str, Image.Image)):
            what = f"shows a {type(visual).__name__}, and pmod takes pictures and videos"
            yield Problem(leaf, what, "leave it out")
            return


def _visuals(doc_to_visual: Callable[[Any], Any], doc: Any) -> list[Any]:
    visuals = doc_to_visual(_viewed(doc))
    if visuals is None:
        return []
    return list(visuals) if isinstance(visuals, (list, tuple)) else [visuals]


def _viewed(value: Any) -> Any:
    """A document with its pictures as `as_rgb` gives them, before a task's own code drops bits or transparency."""
    if isinstance(value, Image.Image):
        return as_rgb(value)
    if isinstance(value, dict):
        return {key: _viewed(item) for key, item in value.items()}
    return [_viewed(item) for item in value] if isinstance(value, list) else value


def _is_video(visual: Any) -> bool:
    """A file, or an array of frames."""
    return is_video(visual) if isinstance(visual, str) else getattr(visual, "ndim", 0) == 4
