"""Everything that ``pmod doctor`` finds out, as one object."""

from __future__ import annotations

import platform
import time
from typing import Any

from pmod_cli import __version__
from pmod_cli.doctor.commands import COMMANDS, verdict
from pmod_cli.doctor.packages import PACKAGES, REQUIRED
from pmod_cli.doctor.probe import LIMIT, run_chains
from pmod_cli.extras import import_remedy, outside
from pmod_cli.output.versions import version_of

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
    """Find out what this machine can do, as ``pmod doctor --json`` prints it; the network is not asked.

    Args:
        limit: Seconds that the import of one package may take.
    """
    started = time.perf_counter()
    found = run_chains(_CHAINS, limit)
    packages = []
    for root, package in PACKAGES.items():
        check = found[f"package {root}"]
        broken = check["status"] == "broken"
        if broken and check["remedy"] is None:  # its process did not live to say
            check["remedy"] = import_remedy(package, package.extra, str(check["error"] or ""))
        packages.append(
            {
                "name": package.name,
                "version": check["facts"].get("version") or version_of(package.name),
                "status": check["status"],
                "optional": root not in REQUIRED,
                "error": check["error"] if broken else None,
                "remedy": check["remedy"],
            }
        )
    gpus, attention, places = (found[name]["facts"] for name in ("gpus", "attention", "places"))
    must_work = {f"package {root}" for root in REQUIRED} | {f"command {name}" for name in COMMANDS}
    return {
        "ok": all(
            check["status"] == "works" or (check["status"] == "missing" and name not in must_work)
            for name, check in found.items()
        ),
        "pmod": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "bounds": [unfit._asdict() for unfit in outside()],
        "gpus": gpus.get("gpus", []),
        "driver": gpus.get("driver"),
        "cuda": gpus.get("cuda"),
        "why_no_gpu": gpus.get("why_none"),
        "attention": attention or None,
        "caches": places.get("caches", []),
        "offline": places.get("offline"),
        "not_found_out": {
            name: found[name]["error"]
            for name in ("gpus", "attention", "places")
            if found[name]["status"] == "broken"
        },
        "commands": [verdict(command, found) for command in COMMANDS.values()],
        "seconds": round(time.perf_counter() - started, 2),
    }
