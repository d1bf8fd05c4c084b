"""Collects, builds and writes a report: an HTML page, a Markdown file and that file's pictures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pmod_cli import __version__
from pmod_cli.output.errors import PmodError, first_line, told_as
from pmod_cli.output.files import check_output, check_place, replacing_all
from pmod_cli.output.marks import TAG
from pmod_cli.output.paths import public_name
from pmod_cli.report import accuracy, sections
from pmod_cli.report.collect import Found, collect
from pmod_cli.report.document import Document, to_html, to_markdown
from pmod_cli.report.models import Model, gather, main_model, reference

_TAG = f"a report of pmod's, {TAG}"
"""At the end of pages and Markdown: what other commands wrote of those names is not replaced."""


def write_report(
    paths: Sequence[str | Path],
    output: str | Path,
    *,
    force: bool = False,
    include_path: str | Path | Sequence[str | Path] | None = None,
) -> dict[str, Any]:
    """Collect the outputs of one or more runs into one page.

    Args:
        paths: Folders that commands wrote to, or files with a command's ``--json``.
        output: The HTML page; the Markdown file and the folder of its pictures get its name.
        force: Whether to replace those that pmod wrote.
        include_path: Folders with the YAML of the user's own tasks, whose pictures are then shown.

    Returns:
        What ``pmod report --json`` prints (see ``docs/json.md``).

    Raises:
        PmodError: Nothing to report on, or a place that cannot be written to.
        MissingExtraError: matplotlib is not installed.
    """
    page = Path(output)
    check_output(page, "a report", (".html", ".htm"), force)
    markdown, folder = page.with_suffix(".md"), page.with_name(f"{page.stem}_files")
    for path in (page, markdown, folder):
        check_place(path, force, paths)
        if path != folder and path.exists() and _TAG.encode() not in path.read_bytes():
            raise PmodError(f"{path} is not of pmod report", "choose another place")
    found = collect([Path(path) for path in paths])
    names = ", ".join(public_name(path) for path in paths)
    build = partial(_build, names=names, page=page, folder=folder.name, include_path=include_path)
    try:
        built = build(found)
    except Exception as error:  # a result is not what a command wrote: which one, each alone will tell
        found = found.without_broken(build)
        if not sum(found.counts.values()):
            raise PmodError(f"nothing that was found can be used: {first_line(error)}") from error
        with told_as("what was found does not go together", "give fewer folders or files"):
            built = build(found)
    document, models, text, pictures = built
    with replacing_all([folder, markdown, page], force=force) as [new_folder, new_markdown, new_page]:
        new_folder.mkdir()
        for name, data in pictures.items():
            (new_folder / name).write_bytes(data)
        new_markdown.write_text(f"{text}\n<!-- {_TAG} -->\n", encoding="utf-8")
        new_page.write_text(f"{to_html(document)}\n<!-- {_TAG} -->\n", encoding="utf-8")
    counts = found.counts
    return {
        "files": {"html": str(page), "markdown": str(markdown), "pictures": str(folder)},
        "found": counts,
        "sections": [section.title for section in document.sections],
        "models": [
            {
                "label": model.label,
                "source": model.source,
                "prefill_flops": model.flops,
                "scores": {
                    task: {"value": score["value"], "stderr": score["stderr"]}
                    for task, score in model.scores.items()
                },
            }
            for model in models
        ],
        "unread": {str(path): reason for path, reason in found.unread.items()},
    }


def _build(
    found: Found, *, names: str, page: Path, folder: str, include_path: Any
) -> tuple[Document, list[Model], str, dict[str, bytes]]:
    """The document, the models in it, and its Markdown with the pictures."""
    models = gather(found)
    other = reference(models, found)
    chapters = [
        sections.summary(found, main_model(models, found), other),
        sections.pictures(found, page.absolute().parent),
        sections.recipe(found),
        sections.cost(found),
        accuracy.accuracy(models, other),
        accuracy.accuracy_and_flops(models),
        sections.training(found),
        accuracy.differences(models, other, include_path),
        sections.environment(found),
    ]
    summary = ", ".join(f"{n} {name if n != 1 else name[:-1]}" for name, n in found.counts.items() if n)
    document = Document(
        "p-MoD report", f"{summary} in {names}; pmod {__version__}", [c for c in chapters if c.blocks]
    )
    return document, models, *to_markdown(document, folder)
