"""The entry point of the ``smoa`` command, which says what to install if the command line's packages are missing."""

from __future__ import annotations

import sys

from smoa_lab.basics.extras import EXTRAS, missing


def main() -> None:
    """Run the ``smoa`` command."""
    lacking = missing(*EXTRAS["cli"])
    if lacking is not None:
        sys.exit(f"smoa: the command line {lacking}")
    from smoa_lab.cli.main import app

    app()


if __name__ == "__main__":
    main()
