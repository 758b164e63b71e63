"""An earlier task of a sequence: trained and merged, stored, and the model from which the next one starts."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock
from peft import PeftModel
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smoa.atomic import new_folder, write_whole
from smoa.errors import ConfigError
from smoa_lab.basics.section import Section, Seed
from smoa_lab.basics.without_secrets import without_secrets
from smoa_lab.config.run_config import ModelSection, RunConfig
from smoa_lab.data.selection import Selection, used_content
from smoa_lab.lessons.questions import prepare
from smoa_lab.models.base_models import base_content, load_base_model
from smoa_lab.study.benches.bench import fit_arguments
from smoa_lab.training.run_folder import RunFolder

logger = logging.getLogger(__name__)

Measure = Callable[[PreTrainedModel, PreTrainedTokenizerBase], dict[str, Any]]


class Between(Section):
    """A task that every entry trains by its own method, rate and seed, between the first and the last one."""

    data: dict[str, Any]
    task: dict[str, Any] = Field(default={})
    training: dict[str, Any] = Field(default={})


class First(Between):
    """How the first task is trained. ``model``, ``task`` and ``training`` are laid over the shared blocks."""

    method: str = "full"
    adapter: dict[str, Any] = Field(default={})
    learning_rate: float = Field(gt=0)
    seed: Seed = 0
    model: dict[str, Any] = Field(default={})


class EarlierTask:
    """The trained task in ``room / KEY``, where KEY is a hash of ``config``: a changed one is trained anew.

    ``dtype`` is what the merged model is stored in. With ``previous`` it starts from that task's model, and is stored
    even if it diverged.
    """

    def __init__(
        self,
        config: RunConfig,
        room: Path,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        previous: EarlierTask | None = None,
    ) -> None:
        self.described = without_secrets(config.model_dump(mode="json"))
        self.described["training"].pop("output_dir")
        self.described["stored_as"] = dtype
        place = config.model
        if previous is not None:
            self.described["model"]["name"] = previous.folder.name
            place = place.model_copy(update={"name": previous.model.name})
        self.folder: Path = room / _key(self.described)
        training = {**config.training, "output_dir": str(self.folder / "run")}
        self.config = config.model_copy(update={"training": training, "model": place})
        self.model: ModelSection = ModelSection(name=str(self.folder / "model"), dtype=dtype)
        self.is_first = previous is None

    def scores(self, records: Selection, measure: Measure, measured: dict[str, Any]) -> dict[str, Any]:
        """What ``measure`` found of the stored model and, under ``start`` of the first task's, of the base model.

        Whatever is missing is made first: the model, then the scores, which are kept for the same ``measured``, what
        decides them. A second process waits meanwhile.

        Raises:
            ConfigError: the training diverged.
        """
        file = self.folder / f"scores-{_key(measured)}.json"
        if not file.is_file():
            self.store(records)
            with FileLock(self.folder / "lock"):
                if not file.is_file():
                    write_whole(file, json.dumps(self._measured(measure)) + "\n")
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found

    def store(self, records: Selection) -> None:
        """Train, merge and save, unless that was done. An interrupted training goes on from its last checkpoint."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / "lock"):
            if not Path(self.model.name).is_dir():
                self._store_model(records, Path(self.model.name))

    def _store_model(self, records: Selection, target: Path) -> None:
        logger.info("Training an earlier task into %s", target)
        run = RunFolder(self.config.folder)
        inputs = {"data": used_content(records), "base model": base_content(self.config.model)}
        checkpoint = run.start(self.config.to_yaml(), inputs)
        ready = prepare(self.config, records)
        model, _, _ = ready.fit(fit_arguments(self.config), checkpoint)
        merged = model.merge_and_unload() if isinstance(model, PeftModel) else model
        if self.is_first and not all(bool(parameter.isfinite().all()) for parameter in merged.parameters()):
            raise ConfigError("first.learning_rate: the first task's training diverged; lower the rate")
        with new_folder(target) as temporary:
            merged.to(getattr(torch, self.model.dtype)).save_pretrained(temporary)
            ready.tokenizer.save_pretrained(temporary)
        shutil.rmtree(run.path)

    def _measured(self, measure: Measure) -> dict[str, Any]:
        found = measure(*load_base_model(self.model))
        if self.is_first:
            found["start"] = measure(*load_base_model(self.config.model.model_copy(update={"dtype": self.model.dtype})))
        return found


def _key(described: dict[str, Any]) -> str:
    """A short hash of plain values."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:12]
