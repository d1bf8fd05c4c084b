"""However a conversion ends, its destination is complete or as it was, and the next run clears up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pmod_cli.checkpoints.write import write_checkpoint
from pmod_cli.conversion.convert import convert
from pmod_cli.conversion.plan import plan_conversion
from pmod_cli.output.errors import PmodError
from pmod_cli.output.files import replacing
from pmod_cli.recipe import default_recipe
from tests.common.checkpoints import contents, make_checkpoint


def plan_with_floor(source, floor):
    return plan_conversion(source, recipe=default_recipe([f"mod.floor={floor}"]))


@pytest.mark.parametrize("existing", ["absent", "existing"])
def test_killed_at_every_step(tmp_path, existing):
    source = make_checkpoint(tmp_path / "source", shards=2)
    plan = plan_with_floor(source, 0.3)
    convert(plan_with_floor(source, 0.2), tmp_path / "before")
    convert(plan, tmp_path / "after")
    before, after = contents(tmp_path / "before"), contents(tmp_path / "after")
    driver = Path(__file__).parents[1] / "common" / "killed_conversion.py"
    done = subprocess.run(
        [sys.executable, driver, source, tmp_path, existing], capture_output=True, text=True, check=True
    )
    *killed, last = json.loads(done.stdout)
    assert (last["signal"], last["exit"]) == (0, 0)
    assert len(killed) > 12
    found = {"before": 0, "after": 0}
    for row in killed:
        assert row["signal"] == signal.SIGKILL
        place = Path(row["place"])
        if existing == "absent" and not (place / "pmod").exists():
            found["before"] += 1
        else:
            left = contents(place / "pmod")
            assert left in (before, after)
            found["after" if left == after else "before"] += 1
        # Whatever was left beside it goes with the next conversion to the same place.
        convert(plan, place / "pmod", force=True)
        assert [path.name for path in place.iterdir()] == ["pmod"]
        assert contents(place / "pmod") == after
    assert found["before"] > 10
    if existing == "existing":
        assert found["after"] > 0  # killed while the replaced checkpoint was being removed


def test_ctrl_c_leaves_nothing(tmp_path):
    source = make_checkpoint(tmp_path / "source", shards=2)
    plan = plan_conversion(source)

    def interrupt(_):
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        convert(plan, tmp_path / "pmod", copy=True, progress=interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_run_that_is_alive_is_left_alone(tmp_path):
    plan = plan_conversion(make_checkpoint(tmp_path / "source"))
    with replacing(tmp_path / "pmod") as room:
        room.mkdir()
        with pytest.raises(PmodError, match="another pmod is writing"):
            convert(plan, tmp_path / "pmod")
        assert room.exists()
        room.rmdir()
        room.write_text("")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pmod", "source"]


def test_permissions_are_the_users(tmp_path):
    umask = os.umask(0o027)
    try:
        write_checkpoint(tmp_path / "pmod", {}, {"config.json": b"{}"})
    finally:
        os.umask(umask)
    assert (tmp_path / "pmod").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "pmod" / "config.json").stat().st_mode & 0o777 == 0o640
