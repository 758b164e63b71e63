"""Where a user's rows come from: files, or a data set of the Hub, read as a stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from smoa.errors import DataError
from smoa_lab.basics.cache import content_of
from smoa_lab.basics.extras import import_package
from smoa_lab.basics.section import Section
from smoa_lab.rows.row_files import Row, files_of, is_of_known_kind, read_rows


class HubRows(Section):
    """A data set of the Hub: ``name`` is its id, ``config`` one of its configurations, ``split`` and ``test_split``
    two of its splits, ``revision`` a branch or commit."""

    name: str
    config: str | None = None
    split: str = "train"
    test_split: str | None = None
    revision: str | None = None


def source_values(place: str) -> dict[str, Any]:
    """The keys of a config's ``data`` block for a file, a folder, or the id of a data set of the Hub."""
    return {"train": place} if _is_local(place) else {"hub": {"name": place}}


def _is_local(place: str) -> bool:
    """A path, or what looks like one; a data set's id has one slash and no ending of a file with rows."""
    path = Path(place)
    return path.expanduser().exists() or is_of_known_kind(path) or place.count("/") != 1 or place[0] in "./~"


class Source(Protocol):
    """Rows that can be read again and again."""

    @property
    def name(self) -> str:
        """What messages and reports call it."""

    def check(self) -> None:
        """Raise DataError if it can be known without reading that there are no rows."""

    def rows(self) -> Iterator[Row]:
        """Every row with its place, one at a time."""

    def state(self) -> Any:
        """Plain values that change when the rows change."""


@dataclass(frozen=True)
class FileSource:
    """A file, or a folder of files."""

    place: Path

    @property
    def name(self) -> str:
        return str(self.place)

    def check(self) -> None:
        files_of(self.place)

    def rows(self) -> Iterator[Row]:
        return read_rows(self.place)

    def state(self) -> Any:
        return [(str(file), content_of(file.expanduser())) for file in files_of(self.place)]


@dataclass(frozen=True)
class HubSource:
    """One split of a data set of the Hub."""

    wanted: HubRows
    split: str

    @property
    def name(self) -> str:
        return f"{self.wanted.name} ({self.split})"

    def check(self) -> None:
        import_package("datasets", "data.hub")

    def rows(self) -> Iterator[Row]:
        datasets = import_package("datasets", "data.hub")
        wanted = self.wanted
        try:
            stream = datasets.load_dataset(
                wanted.name, wanted.config, split=self.split, revision=wanted.revision, streaming=True
            )
            yield from ((f"{self.name}, row {number}", row) for number, row in enumerate(stream, start=1))
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            raise DataError(f"data.hub: cannot read {wanted.name!r}, split {self.split!r}: {error}") from error

    def state(self) -> Any:
        """The commit, so that a data set that changed is read anew."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        try:
            commit = HfApi().dataset_info(self.wanted.name, revision=self.wanted.revision).sha
        except (OSError, ValueError, HfHubHTTPError) as error:
            raise DataError(f"data.hub.name: cannot find {self.wanted.name!r} on the Hub: {error}") from error
        return [self.wanted.model_dump(), self.split, commit]
