"""Collects, builds and writes a report: an HTML page, a Markdown file and that file's pictures."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pmod_cli import __version__
from pmod_cli.output.errors import PmodError
from pmod_cli.output.files import check_output, replacing, write_file
from pmod_cli.report import accuracy, sections
from pmod_cli.report.collect import collect
from pmod_cli.report.document import Document, to_html, to_markdown
from pmod_cli.report.models import gather, main_model, reference

_PICTURES = {".png", ".jpg", ".jpeg"}


def write_report(paths: Sequence[str | Path], output: str | Path, *, force: bool = False) -> dict[str, Any]:
    """Collect the outputs of one or more runs into one page.

    Args:
        paths: Folders that commands wrote to, or files with a command's ``--json``.
        output: The HTML page; the Markdown file and the folder of its pictures get its name.
        force: Whether to replace them if they exist.

    Returns:
        What ``pmod report --json`` prints (see ``docs/json.md``).

    Raises:
        PmodError: Nothing to report on, or a place that cannot be written to.
        MissingExtraError: matplotlib is not installed.
    """
    page = Path(output)
    check_output(page, "a report", (".html", ".htm"), force)
    markdown, folder = page.with_suffix(".md"), page.with_name(f"{page.stem}_files")
    for path in (markdown, folder):
        if path.exists() and not force:
            raise PmodError(f"{path} exists", "--force replaces it")
    found = collect([Path(path) for path in paths])
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
        accuracy.differences(models, other),
        sections.environment(found),
    ]
    counts = found.counts
    summary = ", ".join(f"{n} {name if n != 1 else name[:-1]}" for name, n in counts.items() if n)
    names = ", ".join(str(path) for path in paths)
    document = Document(
        "p-MoD report", f"{summary} in {names}; pmod {__version__}", [c for c in chapters if c.blocks]
    )
    text, pictures = to_markdown(document, folder.name)
    if folder.exists() and not (folder.is_dir() and {path.suffix for path in folder.iterdir()} <= _PICTURES):
        raise PmodError(f"{folder} is not a folder of a report's pictures", "choose another output")
    with replacing(folder) as partial:
        partial.mkdir()
        for name, data in pictures.items():
            (partial / name).write_bytes(data)
        shutil.rmtree(folder, ignore_errors=True)
    write_file(markdown, text)
    write_file(page, to_html(document))
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
