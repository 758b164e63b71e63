"""Studies of learning without forgetting: a first task is trained once, then each entry trains one or more others.

A run's JSON also has

- ``first``: scores of the first task after the last one; those before it are in ``untouched.json``
- ``elsewhere``, ``texts``: loss on the texts of ``other_domain``, in nats per token; at most 256 tokens of each
- ``forgot``: the rise of both losses, with its standard error, paired by question or text
- ``change``: of 18 layers, mean and maximum of each figure of :class:`smoa.analysis.UpdateSize`
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smoa.analysis import update_size
from smoa.atomic import new_folder, write_whole
from smoa.errors import ConfigError
from smoa_lab.base_models import empty_model, load_base_model
from smoa_lab.config.run import DataSection, Dtype, ModelSection, RunConfig, check_config
from smoa_lab.config.run import native_dtype as machine_dtype
from smoa_lab.data.tasks import Selection
from smoa_lab.inspect import adapted_layers, weights_and_updates
from smoa_lab.scoring.evaluation import Outcome, answer_outcomes, text_losses, whole_text
from smoa_lab.scoring.losses import Losses
from smoa_lab.study.runner import Part, Runner, scored
from smoa_lab.study.study import Entry, Study
from smoa_lab.training.adapting import check_adapter
from smoa_lab.training.loaded_run import LoadedRun, encoder_of, load_run
from smoa_lab.training.run_folder import RunFolder

logger = logging.getLogger(__name__)

Measure = Callable[[PreTrainedModel, PreTrainedTokenizerBase], dict[str, Any]]
MEASURED = ("data", "task", "first", "between", "elsewhere")
"""Parts of a stored config that decide what an earlier task's model is scored on."""
LAYERS = 18
"""So many layers are decomposed, spread evenly over the model: three SVDs each."""


class EarlierTask:
    """A task trained and merged in ``room / KEY``, where KEY is a hash of its config: a changed one is trained anew.

    ``dtype`` is what the merged model is stored in. With ``previous`` it starts from that task's model, and is stored
    even if it diverged.
    """

    def __init__(
        self, config: RunConfig, room: Path, dtype: Dtype = "float32", previous: EarlierTask | None = None
    ) -> None:
        self.described = config.model_dump(mode="json")
        self.described["training"].pop("output_dir")
        self.described["stored_as"] = dtype
        base = config.model
        if previous is not None:
            self.described["model"]["name"] = previous.folder.name
            base = base.model_copy(update={"name": previous.model.name})
        self.folder: Path = room / _key(self.described)
        training = {**config.training, "output_dir": str(self.folder / "run")}
        self.config = config.model_copy(update={"training": training, "model": base})
        self.model: ModelSection = ModelSection(name=str(self.folder / "model"), dtype=dtype)
        self.is_first = previous is None

    def scores(self, records: Selection, measure: Measure, measured: dict[str, Any]) -> dict[str, Any]:
        """What ``measure`` says of the stored model and, under ``start`` of the first task's, of the base model.

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
                    scores = measure(*load_base_model(self.model))
                    if self.is_first:
                        start = self.config.model.model_copy(update={"dtype": self.model.dtype})
                        scores["start"] = measure(*load_base_model(start))
                    write_whole(file, json.dumps(scores) + "\n")
        stored: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return stored

    def store(self, records: Selection) -> None:
        """Train, merge and save, unless that was done. An interrupted training goes on from its last checkpoint."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / "lock"):
            if not Path(self.model.name).is_dir():
                self._train(records, Path(self.model.name))

    def _train(self, records: Selection, target: Path) -> None:
        logger.info("Training an earlier task into %s", target)
        run, loaded = RunFolder(self.config.folder), load_run(self.config, records)
        checkpoint = run.start(self.config.to_yaml(), loaded.inputs())
        model, _, _ = loaded.fit(loaded.arguments(), checkpoint)
        merged = model.merge_and_unload() if isinstance(model, PeftModel) else model
        if self.is_first and not all(bool(parameter.isfinite().all()) for parameter in merged.parameters()):
            raise ConfigError("first.learning_rate: the first task's training diverged; lower the rate")
        with new_folder(target) as temporary:
            merged.to(getattr(torch, self.model.dtype)).save_pretrained(temporary)
            loaded.tokenizer.save_pretrained(temporary)
        shutil.rmtree(run.path)


class SequenceRunner(Runner):
    """Trains the last task on the model of the earlier ones; scores all on their test parts, and other text.

    With ``replay`` the last task is trained on that many training rows of the first one too.
    """

    def __init__(self, study: Study) -> None:
        super().__init__(study.shared, study.other_domain)
        assert study.first is not None
        self.first, self.between, self.replay = study.first, study.between, study.replay
        self.folder = study.folder

    def first_config(self, place: str = "study") -> RunConfig:
        """The whole run of the first task; raises ConfigError with all problems of it."""
        own = self.first.model_dump(include={"data", "method", "adapter"})
        laid = {key: {**(self.shared.get(key) or {}), **getattr(self.first, key)} for key in ("model", "task")}
        rate = {"learning_rate": self.first.learning_rate, "seed": self.first.seed}
        training = {**(self.shared.get("training") or {}), **self.first.training, **rate}
        return check_config({**own, **laid, "training": training}, place)

    def between_configs(self, config: RunConfig, place: str = "study") -> list[RunConfig]:
        """The whole runs of the tasks between, by an entry's own config."""
        values = config.model_dump(mode="json")
        configs = []
        for number, task in enumerate(self.between):
            laid = {
                "data": task.data,
                "task": {**(self.shared.get("task") or {}), **task.task},
                "training": {**config.training, **task.training},
            }
            configs.append(check_config({**values, **laid}, f"{place}.between[{number}]"))
        return configs

    def stored_config(self, config: RunConfig) -> dict[str, Any]:
        """What a trial keeps of its config: also the earlier tasks, which decide where an entry starts."""
        between = {"between": [task.model_dump(mode="json") for task in self.between]} if self.between else {}
        replay = {"replay": self.replay} if self.replay else {}
        return {**super().stored_config(config), "first": self._first_task.described, **between, **replay}

    def check_needs(self, entry: Entry) -> None:
        """Check the first task's adapter too."""
        super().check_needs(entry)
        first = self.first_config()
        check_adapter(empty_model(first.model), first.method, first.adapter)

    @cached_property
    def records(self) -> Selection:
        """The records of the last task, and among its training rows those that are replayed; read once."""
        last: Selection = super().records
        first = self.earlier_records[0]
        train = last.train + first.train[: self.replay]
        return replace(last, train=train, families={**first.families, **last.families})

    @cached_property
    def earlier_records(self) -> list[Selection]:
        """The records of the earlier tasks; read once."""
        named = {"first": self.first.data, **{f"between[{i}]": task.data for i, task in enumerate(self.between)}}
        selections = {name: DataSection.model_validate(data).select() for name, data in named.items()}
        for name, records in selections.items():
            if not records.test:
                raise ConfigError(f"{name}.data.test_examples: a study needs a test part; it has no questions")
        rows = len(selections["first"].train)
        if self.replay > rows:
            raise ConfigError(f"replay: must be at most the {rows} training rows of first.data, got {self.replay}")
        return list(selections.values())

    @cached_property
    def _first_task(self) -> EarlierTask:
        return EarlierTask(self.first_config(), self.folder / "work" / "first", self._dtype)

    @property
    def _dtype(self) -> Dtype:
        return self.shared["model"].get("dtype") or machine_dtype()

    def _earlier_tasks(self, config: RunConfig) -> list[EarlierTask]:
        """The first one, and in the run's own folder those between."""
        tasks = [self._first_task]
        for between in self.between_configs(config):
            room = Path(config.training["output_dir"]) / "between"
            tasks.append(EarlierTask(between, room, self._dtype, tasks[-1]))
        return tasks

    def before(self, config: RunConfig, tasks: Sequence[EarlierTask]) -> dict[str, Any]:
        """Scores of the model of the last of these tasks; what was not trained is."""

        def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
            self.encoder = encoder_of(config, tokenizer)
            return self._measured(model, config)

        pairs = list(zip(tasks, self.earlier_records, strict=False))
        for task, records in pairs:
            task.store(records)
        task, records = pairs[-1]
        stored = self.stored_config(config)
        return task.scores(records, measure, {key: stored.get(key) for key in MEASURED})

    def _load(self, config: RunConfig) -> LoadedRun:
        tasks = self._earlier_tasks(config)
        self.before(config, tasks)
        base = config.model.model_copy(update={"name": tasks[-1].model.name})
        return super()._load(config.model_copy(update={"model": base}))

    def _scores(self, model: nn.Module | None, config: RunConfig, part: Part) -> dict[str, Any]:
        if model is None:
            return self.before(config, [self._first_task])
        before = self.before(config, self._earlier_tasks(config))
        after = self._measured(model, config)
        pairs = {"first": (before["first"]["questions"], after["first"]["questions"])}
        if "texts" in before:
            pairs["elsewhere"] = (before["texts"], after["texts"])
        losses = {name: [Losses(part["nll"], part["tokens"]) for part in pair] for name, pair in pairs.items()}
        forgot = {name: asdict(late.change_from(early)) for name, (early, late) in losses.items()}
        return {**after, "forgot": forgot, "change": weight_changes(model, self._load(config).base)}

    def _measured(self, model: nn.Module, config: RunConfig) -> dict[str, Any]:
        """Scores of the last task as in other studies, of all earlier tasks, and of the text elsewhere."""
        configs = [self.first_config(), *self.between_configs(config)]
        outcomes: list[Outcome] = []
        for earlier, records in zip(configs, self.earlier_records, strict=True):
            encoder = encoder_of(earlier, self.encoder.tokenizer)
            outcomes += answer_outcomes(model, encoder, records.test, earlier.task.eval_batch_tokens)
        content = " ".join(records.account["used"]["test"]["sha256"] for records in self.earlier_records)
        return {**super()._scores(model, config, "test"), "first": {"sha256": content, **scored(outcomes)}}

    def _on_other_domain(self, model: nn.Module | None, config: RunConfig) -> dict[str, Any]:
        """The loss on the records' whole texts, and that of each."""
        assert model is not None  # the untouched model is scored as the first task's
        losses = text_losses(model, self.encoder.tokenizer, [whole_text(record) for record in self._other_rows])
        return {"elsewhere": losses.mean, "texts": asdict(losses)}


def weight_changes(model: nn.Module, base: nn.Module) -> dict[str, Any] | None:
    """How much a run changed the weights: mean and maximum over layers of each figure of :class:`UpdateSize`; None
    where the run diverged, or changed no matrix.

    ΔW is the difference to ``base``, also for methods that take a part of W out when they start. The layers are the
    adapted ones or, where all weights were trained, all linear ones but the output layer.
    """
    layers = dict(base.named_modules())
    sizes = []
    for path, weight, update in _weights_and_updates(model):
        layer: Any = layers[path]
        before = layer.weight.detach().to(weight.device).float()
        delta = (weight - before) + update
        if not delta.isfinite().all():
            return None
        sizes.append(asdict(update_size(before, delta)))
    if not sizes:
        return None
    values = {figure: [size[figure] for size in sizes] for figure in sizes[0]}
    return {
        "layers": len(sizes),
        **{figure: {"mean": sum(of_all) / len(of_all), "max": max(of_all)} for figure, of_all in values.items()},
    }


def _weights_and_updates(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Path, weight and ΔW of up to ``LAYERS`` layers, evenly spread, the first and the last included."""
    if isinstance(model, PeftModel):
        adapted = adapted_layers(model.get_base_model())
        for path, layer in _spread([pair for pair in adapted if hasattr(pair[1].get_base_layer(), "weight")]):
            yield from weights_and_updates(path, layer, model.active_adapter)
        return
    getter: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = getter()
    linear = [pair for pair in model.named_modules() if isinstance(pair[1], nn.Linear) and pair[1] is not head]
    for path, whole in _spread(linear):
        yield path, whole.weight.detach().float(), torch.zeros((), device=whole.weight.device)


def _spread(layers: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    if len(layers) <= LAYERS:
        return layers
    return [layers[round(number * (len(layers) - 1) / (LAYERS - 1))] for number in range(LAYERS)]


def _key(described: dict[str, Any]) -> str:
    """A short hash of plain values."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:12]
