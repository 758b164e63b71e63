"""The ``smoa`` command as ``python -m smoa``."""

from __future__ import annotations

from smoa_lab.__main__ import main

main()
