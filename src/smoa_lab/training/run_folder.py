"""A run's folder: config, log, checkpoints, adapter, loss curve, samples, and last ``metrics.json``.

That file marks it finished. A finished run is never overwritten. An interrupted one is resumed by the same config and
by no other.
"""

from __future__ import annotations

import ctypes
import gc
import gzip
import importlib.metadata
import json
import logging
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain, compress, count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from smoa.errors import ConfigError, DataError
from smoa_lab.basics.files import new_file, read_stored, write_whole
from smoa_lab.basics.values import finite, first_of, flat, json_text
from smoa_lab.config.run import RunConfig
from smoa_lab.config.yaml_text import parse_yaml
from smoa_lab.data.row import Row

logger = logging.getLogger(__name__)

PACKAGES = ("smoa", "torch", "transformers", "peft", "accelerate", "trl")


class Taken(ConfigError):  # noqa: N818 - says what the folder is
    """Another process trains into a run's folder."""


class OfAnother(ConfigError):  # noqa: N818 - says what the folder is
    """A run's folder has an unfinished run of another config, or of what has changed since."""


class RunFolder:
    """The files of one run under ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.adapter = path / "adapter"
        self.config = path / "config.yaml"
        self.inputs = path / "inputs.json"
        self.trained = path / "trained.npy"
        self.metrics = path / "metrics.json"
        self.rows = path / "rows.jsonl.gz"
        self.picture = path / "loss_curve.png"
        self.log = path / "train.log"
        self.samples = path / "samples.md"
        self.lock = path / "lock"

    @property
    def finished(self) -> bool:
        return self.metrics.is_file()

    def not_trained_on(self, rows: Sequence[Row]) -> tuple[list[Row], int | None]:
        """The rows that the run was not trained on, and how many it was; all and None where that isn't known."""
        if not self.trained.is_file():
            logger.warning("%s: doesn't keep which rows it was trained on; some of these may be", self.path)
            return list(rows), None
        new = ~np.isin(np.array([row.key for row in rows], np.uint64), np.load(self.trained))
        kept = list(compress(rows, new))
        if len(kept) < len(rows):
            logger.warning("%d of the %d rows were trained on, and are left out", len(rows) - len(kept), len(rows))
        return kept, len(rows) - len(kept)

    def check(self, config_yaml: str) -> None:
        """Raise ConfigError if another process trains into the folder, or it has a finished run, files that are not of
        a run, or checkpoints of another config."""
        if self.finished:
            raise ConfigError(f"{self.path}: contains a finished run; choose another training.output_dir or move it")
        if self.lock.is_file():
            with self.alone():
                pass
        elif is_first_process() and not self.inputs.is_file() and any(self.path.glob("[!.]*")):
            # what a run removes would be among the files
            raise ConfigError(f"{self.path}: has files and no run of smoa's; choose another training.output_dir")
        self._check_values(config_yaml)

    def _check_values(self, config_yaml: str) -> None:
        """Raise :class:`OfAnother` for checkpoints of a config that differs in more than the folder's name and what
        scores answers."""
        if not self.config.is_file() or get_last_checkpoint(str(self.path)) is None:
            return
        texts = self.config.read_text(encoding="utf-8"), config_yaml
        before, now = ({**flat(parse_yaml(text, self.config))} for text in texts)
        keys = sorted((before.keys() | now.keys()) - {"training.output_dir", "data.metric"})
        if other := [f"{key}={before.get(key)}" for key in keys if before.get(key) != now.get(key)]:
            found = f"contains an unfinished run of another config, with {first_of(other)}"
            raise OfAnother(f"{self.path}: {found}; take that, choose another training.output_dir, or remove it")

    def _last_whole_checkpoint(self) -> str | None:
        """The latest checkpoint; one that a kill or a full disk left half-written is removed.

        The Trainer writes ``trainer_state.json`` last, so where that is whole everything was.
        """
        while checkpoint := get_last_checkpoint(str(self.path)):
            try:
                read_stored(Path(checkpoint, TRAINER_STATE_NAME))
                return str(checkpoint)
            except DataError:
                logger.warning("%s is incomplete and is removed", checkpoint)
                shutil.rmtree(checkpoint)
        return None

    def write_rows(self, lines: Iterable[dict[str, Any]]) -> None:
        """Write what is known of each held-out row, with null for what is not finite."""
        with new_file(self.rows) as file, gzip.open(file, "wt", encoding="utf-8") as stream:
            stream.writelines(json.dumps(finite(line)) + "\n" for line in lines)

    def finish(self, metrics: dict[str, Any]) -> None:
        """Write the metrics, which marks the run finished, and remove its checkpoints."""
        write_whole(self.metrics, json_text(metrics) + "\n")
        self.remove_checkpoints()

    def remove_checkpoints(self) -> None:
        for path in self.path.glob("checkpoint-*"):
            if path.is_dir() and path.name.partition("-")[2].isdecimal():  # as the Trainer names its own
                shutil.rmtree(path)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let no other process train into the folder; of the processes of one run, the first locks it for all.

        Raises :class:`Taken` if another process does. The system releases the lock of a process that dies. Of a
        finished run no lock is left.
        """
        if not is_first_process():
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.lock)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise Taken(f"{self.path}: another process trains into it; wait, or choose another output_dir") from None
        try:
            yield
        finally:
            lock.release()
            if self.finished:
                self.lock.unlink(missing_ok=True)  # whoever takes it now, or makes a new one, finds the finished run

    @contextmanager
    def claimed(self, config_yaml: str, inputs: Mapping[str, str]) -> Iterator[str | None]:
        """Claim the folder for this config, and let no other process train into it; the checkpoint to resume from, if
        an interrupted run left one. What smoa logs is kept there too.

        ``inputs`` names what the run starts from by what changes with its content.
        """
        with self.alone():
            if self.finished:  # by another process, meanwhile
                raise ConfigError(f"{self.path}: contains a finished run; choose another training.output_dir")
            self._check_values(config_yaml)
            checkpoint = self._last_whole_checkpoint() if self.path.is_dir() else None
            if checkpoint and inputs:
                began_with = read_stored(self.inputs)
                if changed := [name for name, content in inputs.items() if began_with[name] != content]:
                    found = f"contains an unfinished run, and the {' and the '.join(changed)} changed since then"
                    remedy = "choose another training.output_dir, or remove the folder"
                    raise OfAnother(f"{self.path}: {found}; put back what was there, {remedy}")
            write_whole(self.config, config_yaml)
            if inputs:
                write_whole(self.inputs, json.dumps(inputs) + "\n")
            with self._logging():
                if checkpoint:
                    logger.info("Resuming from %s", checkpoint)
                yield checkpoint

    @contextmanager
    def _logging(self) -> Iterator[None]:
        """Append what smoa logs to ``train.log``."""
        logger = logging.getLogger("smoa_lab")
        handler = logging.FileHandler(self.log, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        level = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
            handler.close()


def is_first_process() -> bool:
    """Whether this process is the only one of its run, or the first of several, which writes and prints for all."""
    return os.environ.get("RANK", "0") == "0"


def in_free_folder(config: RunConfig) -> RunConfig:
    """``config`` in its own folder, or in the first of ``…-2``, ``…-3`` and so on without a finished run."""
    folders = (config.folder.with_name(f"{config.folder.name}-{number}") for number in count(2))
    free = next(folder for folder in chain([config.folder], folders) if not RunFolder(folder).finished)
    return config.model_copy(update={"training": {**config.training, "output_dir": str(free)}})


def provenance(seed: int, device: torch.device) -> dict[str, Any]:
    """Commit, versions, machine and seed of a result."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = next(iter(names), "") or platform.processor() or platform.machine()
    return {
        **_git_state(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor,
        "threads": torch.get_num_threads(),
        "seed": seed,
    }


def reset_peak_memory() -> None:
    """Count :func:`peak_memory` from here, where the system can: else a study's runs all have the largest one's."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)  # what earlier runs freed
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's memory that tensors took at most, or of this process in the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _git_state() -> dict[str, Any]:
    """Commit and dirty flag of the repository that has this file; None for an installed package."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    commit, _, dirty = found.stdout.strip().partition("-")
    return {"commit": commit, "dirty": bool(dirty)}
