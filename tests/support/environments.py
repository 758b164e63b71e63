"""Virtual environments with some packages of their own, on top of those of the environment that runs this."""

import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPTS = "Scripts" if os.name == "nt" else "bin"


def build(folder: Path, *wanted: str, with_pip: bool = False) -> Path:
    """The Python of a new environment in which pip has installed `wanted`; everything else, such as torch, is borrowed.

    pip is borrowed too, unless a framework calls the one beside its own Python.

    Raises:
        RuntimeError: pip failed, with what it said.
    """
    venv.create(folder, with_pip=with_pip)
    borrowed = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages(folder) / "zz_borrowed.pth").write_text("\n".join([*borrowed, ""]), encoding="utf-8")  # after its own
    python = folder / SCRIPTS / "python"
    # Compiled when imported: of transformers that is a small part.
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-compile", *wanted]
    pip = subprocess.run(command, capture_output=True, text=True, check=False)
    if pip.returncode:
        raise RuntimeError(f"pip install {' '.join(wanted)}:\n{pip.stderr}")
    return python


def packages(folder: Path) -> Path:
    """Where an environment has its own packages."""
    return next(folder.glob("lib/python*/site-packages"), folder / "Lib" / "site-packages")


def run(python: Path | str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A process of that Python which imports smoa from this checkout."""
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [str(python), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
