"""Tasks that a paid judge scores, told by their code before a model is loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from pmod_cli.evaluation.scoring_code import scoring_code

_CLIENTS = {"anthropic", "boto3", "dashscope", "google", "litellm", "openai", "reka"}
_JUDGES = {
    "lmms_eval.llm_judge": "OPENAI_API_KEY",
    "lmms_eval.verifiers.openai": "OPENAI_API_KEY",
    "lmms_eval.verifiers.gemini": "GOOGLE_API_KEY",
}
_VARIABLE = re.compile(r"""(?:getenv|environ(?:\.get)?)\s*[\[(]\s*["'](\w+)["']""")


def missing_key(config: Mapping[str, Any]) -> str | None:
    """The environment variable with the key, or the address, of a task's judge, if there is a judge and none is set.

    ``config`` is the task's YAML with the functions that it names. A task has a judge if its scoring code can reach a
    client of a paid model, or posts requests with a key or to an address that it has from the environment.
    """
    metrics = [entry.get("aggregation") for entry in config.get("metric_list") or []]
    names, files, _ = scoring_code([config.get("process_results"), *metrics])
    kind = os.environ.get("API_TYPE", "openai").lower()
    if kind not in ("openai", "azure", "async_openai", "async_azure"):
        return None  # a judge that has other credentials, or needs none
    azure = "azure" in kind
    keys = {key for module, key in _JUDGES.items() if any(name.startswith(module) for name in names)}
    client = any(name.split(".")[0] in _CLIENTS for name in names)
    posts = {"requests", "post"} <= names
    read = {name for file in files for name in _VARIABLE.findall(file.read_text("utf-8"))}
    if client or posts:
        keys |= {name for name in read if name.endswith("API_KEY")}
        if client and not keys:
            keys = {"OPENAI_API_KEY"}
    if azure and "OPENAI_API_KEY" in keys:
        keys.add("AZURE_API_KEY")
    wanted = {key for key in keys if ("AZURE" in key) == azure} or keys
    if posts and not wanted:
        wanted = {name for name in read if name.endswith(("API_URL", "BASE_URL"))}
    if not wanted or any(map(os.environ.get, wanted)):
        return None
    usual = "AZURE_API_KEY" if azure else "OPENAI_API_KEY"
    return usual if usual in wanted else min(wanted)
