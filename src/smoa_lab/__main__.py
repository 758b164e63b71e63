"""The entry point of the ``smoa`` command, which says what to install if the command line's packages are missing."""

from __future__ import annotations

import sys

from smoa_lab.basics.extras import advice


def main() -> None:
    """Run the ``smoa`` command."""
    try:
        from smoa_lab.cli.main import app

        app()
    except ModuleNotFoundError as error:
        lacking = advice(error.name)
        if lacking is None:
            raise
        sys.exit(f"smoa: the command line {lacking}")


if __name__ == "__main__":
    main()
