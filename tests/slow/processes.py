"""Two processes that train together over gloo, as torchrun would start them, but with one import of torch."""

import importlib
import os
import runpy
import signal
import socket
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEADLINE = 300
"""Seconds; two processes that wait for each other never end by themselves."""
IMPORTS = ("accelerate", "smoa", "tests.support.tiny")
"""What takes both ranks longer to import than to train."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def environment(**variables: str) -> dict[str, str]:
    """Of a child process: one thread, and nothing that makes it one of several processes unless asked."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "FSDP_"))}
    return inherited | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONFAULTHANDLER": "1"} | variables


def run_two(module: str, *arguments: str, first: Sequence[str] = ()) -> None:
    """Run `python -m module` as ranks 0 and 1, with the modules `first` imported once for both; fails with their output
    unless both end well."""
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "tests.slow.processes", ",".join([*IMPORTS, *first]), module, *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(**shared), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout


def _run_ranks(imports: str, module: str, arguments: list[str]) -> int:
    """Both ranks in processes of their own; when one fails, or none ends in time, both are killed."""
    for name in imports.split(","):
        importlib.import_module(name)
    ranks = set()
    for rank in ("0", "1"):
        if (process := os.fork()) == 0:
            signal.alarm(DEADLINE)
            os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
            sys.argv = [module, *arguments]
            runpy.run_module(module, run_name="__main__")
            return 0
        ranks.add(process)
    while ranks:
        process, status = os.wait()
        ranks.discard(process)
        if status:
            for other in ranks:
                os.kill(other, signal.SIGKILL)
            return 1
    return 0


# Virtual environments with some packages of their own, on top of those of the environment that runs this.


SCRIPTS = "Scripts" if os.name == "nt" else "bin"


def build_environment(folder: Path, *wanted: str, with_pip: bool = False) -> Path:
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


def run_python(python: Path | str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A process of that Python which imports smoa from this checkout."""
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [str(python), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    sys.exit(_run_ranks(sys.argv[1], sys.argv[2], sys.argv[3:]))
