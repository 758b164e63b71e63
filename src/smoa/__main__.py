"""``python -m smoa`` is the ``smoa`` command."""

from __future__ import annotations

from smoa_lab.cli.main import app

app()
