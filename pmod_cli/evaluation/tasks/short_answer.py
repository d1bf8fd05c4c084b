"""Prompt and score of the short-answer task, as lmms-eval calls them."""

from __future__ import annotations

from typing import Any


def doc_to_visual(doc: dict[str, Any]) -> list[Any]:
    """The picture of a document."""
    return [doc["image"].convert("RGB")]


def doc_to_text(doc: dict[str, Any]) -> str:
    """The question as it stands: a model of short answers needs no instruction to be short."""
    return doc["question"]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 for a right answer, else 0; once over all kinds and once under the document's own kind."""
    score = float(_plain(results[0]) == _plain(doc["answer"]))
    return {"exact_match": score} | ({doc["kind"]: score} if doc.get("kind") else {})


def _plain(text: str) -> str:
    return text.strip().rstrip(".").casefold()
