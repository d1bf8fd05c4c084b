"""Everything that ``pmod doctor`` finds out, as one object."""

from __future__ import annotations

import platform
import time
from dataclasses import asdict
from typing import Any

from pmod_cli import __version__, bounds
from pmod_cli.doctor.commands import COMMANDS, verdict
from pmod_cli.doctor.packages import PACKAGES, REQUIRED, version_of
from pmod_cli.doctor.probe import LIMIT, run_chains
from pmod_cli.extras import import_remedy

_EVALUATION = ("lmms_eval", "datasets", "tensorboard", "fvcore")
_CHAINS = (
    # lmms-eval takes about as long as all the others together, so it has a process of its own.
    [*(f"package {root}" for root in _EVALUATION), "command eval", "places"],
    [
        *(f"package {root}" for root in PACKAGES if root not in _EVALUATION),
        "gpus",
        "attention",
        *(f"command {name}" for name in COMMANDS if name != "eval"),
    ],
)


def examine(limit: float = LIMIT) -> dict[str, Any]:
    """Find out what this machine can do; the network is not asked.

    Args:
        limit: Seconds that the import of one package may take.

    Returns:
        What ``pmod doctor --json`` prints (see ``docs/json.md``).
    """
    started = time.perf_counter()
    found = run_chains(_CHAINS, limit)
    packages = [_package(root, found[f"package {root}"]) for root in PACKAGES]
    gpus, attention, places = (found[name]["facts"] for name in ("gpus", "attention", "places"))
    other = {
        name: found[name]["error"]
        for name in ("gpus", "attention", "places")
        if found[name]["status"] == "broken"
    }
    return {
        "ok": not other
        and all(package["status"] != "broken" for package in packages)
        and all(found[f"package {root}"]["status"] == "works" for root in REQUIRED)
        and all(found[f"command {name}"]["status"] == "works" for name in COMMANDS),
        "pmod": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "bounds": [asdict(outside) for outside in bounds.outside()],
        "gpus": gpus.get("gpus", []),
        "driver": gpus.get("driver"),
        "cuda": gpus.get("cuda"),
        "why_no_gpu": gpus.get("why_none"),
        "attention": attention or None,
        "caches": places.get("caches", []),
        "offline": places.get("offline"),
        "not_found_out": other,
        "commands": [verdict(command, found) for command in COMMANDS.values()],
        "seconds": round(time.perf_counter() - started, 2),
    }


def _package(root: str, found: dict[str, Any]) -> dict[str, Any]:
    package = PACKAGES[root]
    remedy = found["remedy"]
    if found["status"] == "broken" and remedy is None:  # its process did not live to say
        remedy = found["remedy"] = import_remedy(package)
    return {
        "name": package.name,
        "version": found["facts"].get("version") or version_of(root),
        "status": found["status"],
        "optional": root not in REQUIRED,
        "error": found["error"] if found["status"] == "broken" else None,
        "remedy": remedy,
    }
