"""One page from what ``pmod profile``, ``finetune``, ``eval`` and ``visualize`` left."""

from pmod_cli.report.write import write_report

__all__ = ["write_report"]
