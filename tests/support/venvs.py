"""Virtual environments for one test: they borrow the packages of the one that runs it, and smoa from this checkout."""

from __future__ import annotations

import os
import subprocess
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]


def borrowing_venv(folder: Path, *wanted: str) -> Path:
    """The Python of a new environment; `wanted` are words for `pip install`, whose packages come before borrowed ones.

    Raises:
        RuntimeError: pip could not install them.
    """
    venv.create(folder, with_pip=True)
    borrowed = [str(ROOT / "src"), sysconfig.get_path("purelib")]
    (packages(folder) / "zz_borrowed.pth").write_text("\n".join(borrowed) + "\n", encoding="utf-8")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pip = subprocess.run([str(python), "-m", "pip", "install", "--quiet", *wanted], capture_output=True, text=True)
    if pip.returncode:
        raise RuntimeError(f"pip install {' '.join(wanted)}:\n{pip.stderr}")
    return python


def packages(folder: Path) -> Path:
    """Where an environment has its own packages."""
    return next(folder.glob("lib/python*/site-packages"), folder / "Lib" / "site-packages")
