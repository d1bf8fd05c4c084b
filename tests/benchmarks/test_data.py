"""The script for training data, with a few records: it makes its inputs, measures, and prints what it found."""

from __future__ import annotations

import sys

import pytest

from tests.benchmarks import data


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_everything_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PMOD_CACHE", str(tmp_path))  # the script sets it, and it is as before afterwards
    data.main(["--tiny", "--work", str(tmp_path / "work")])
    command, _, *rows = capsys.readouterr().out.splitlines()
    assert "--records 30 --large 90" in command
    found = {name.strip(): float(value) for name, _, value in (row.rpartition(" ") for row in rows)}
    assert len(found) == 10
    for name in ("check: seconds", "model: cpu", "start: first, seconds", "start: first, most memory, MB"):
        assert found[name] >= 0.01, name
