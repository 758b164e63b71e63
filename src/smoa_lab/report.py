"""The page of one run: scores, loss, answers before and after, what was forgotten, the config, and how to load it.

A run may be whole, unfinished, damaged or of an older version: what is there is shown, what is missing is named.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from smoa.atomic import check_place
from smoa.errors import ConfigError
from smoa.files.card import loading_code
from smoa_lab.base_models import described_base
from smoa_lab.config.yaml_text import parse_yaml, to_yaml
from smoa_lab.pages.run_card import ANSWERS
from smoa_lab.pages.run_charts import accuracies, balance, losses
from smoa_lab.pages.tables import score_table, time_text
from smoa_lab.pages.templates import Figure, code, page, warning, write_page
from smoa_lab.training.run_folder import RunFolder

WHOLE_MODEL = 'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("PATH")'


@dataclass(frozen=True)
class RunRecord:
    """A run: its metrics and its config, both as far as they are known. ``whole`` is whether the metrics are those of a
    finished run."""

    folder: RunFolder
    metrics: dict[str, Any]
    config: dict[str, Any]
    whole: bool

    @property
    def method(self) -> str:
        """The method's name; empty if it is not known."""
        return str(self.config.get("method", "smoa")) if self.config else ""


def report_run(place: str | Path, output: Path | None = None) -> tuple[Path, list[str]]:
    """Write the page of the run in the folder ``place`` into it, or as ``output``; where it is, and a sentence for each
    thing that is missing or damaged.

    Raises:
        ConfigError: ``place`` is not the folder of a run.
    """
    record, missing = read_run(place)
    file = output or record.folder.report
    check_place(file)
    shown: dict[str, list[Any]] = {}
    faulty = []
    for title, build in SECTIONS.items():
        try:
            shown[title] = build(record)
        except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
            if build is _loading:
                missing.append(f"adapter/ is damaged: {error}.")
            elif record.whole:
                faulty.append(title)
    if faulty:
        missing.append(f"metrics.json lacks, or has damaged, what it should have about: {', '.join(faulty)}.")
    introduction = [*([warning(" ".join(missing))] if missing else []), *shown.pop("Run", [])]
    sections = [(title, parts) for title, parts in shown.items() if parts]
    write_page(file, page(record.folder.path.resolve().name, sections, introduction))
    return file, missing


def read_run(place: str | Path) -> tuple[RunRecord, list[str]]:
    """The record of the run in the folder ``place``, and a sentence for each file that is missing or damaged.

    Raises:
        ConfigError: the folder has neither metrics nor a config.
    """
    folder, missing = RunFolder(Path(place)), []
    if not folder.metrics.is_file() and not folder.config.is_file():
        raise ConfigError(f"{place}: is not the folder of a run: contains neither metrics.json nor config.yaml")
    try:
        metrics, whole = dict(json.loads(folder.metrics.read_text(encoding="utf-8"))), True
    except FileNotFoundError:
        metrics, whole = _logged(folder), False
        missing.append(
            "The run is not finished: metrics.json is missing. Run the same smoa train again to go on with it."
        )
    except (ValueError, TypeError) as error:
        metrics, whole = _logged(folder), False
        missing.append(f"metrics.json is damaged: {error}. smoa eval scores the adapter again.")
    try:
        config = parse_yaml(folder.config.read_text(encoding="utf-8"), folder.config)
    except (OSError, ValueError) as error:
        config = metrics["config"] if isinstance(metrics.get("config"), dict) else {}
        instead = " What is shown of it is from metrics.json." if config else ""
        missing.append(f"config.yaml is missing or damaged: {error}.{instead}")
    return RunRecord(folder, metrics, config, whole), missing


def _logged(folder: RunFolder) -> dict[str, Any]:
    """What the last checkpoint logged, in place of metrics."""
    checkpoint = get_last_checkpoint(str(folder.path))
    try:
        state = json.loads(Path(checkpoint or folder.path, TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        return {"history": state["log_history"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _facts(record: RunRecord) -> list[Any]:
    parameters, training, origin = (record.metrics[key] for key in ("parameters", "training", "provenance"))
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items() if version)
    return [
        f"{record.method}, {parameters['trainable']:,} of {parameters['total']:,} parameters trained, "
        f"{training['steps']} steps{time_text(training)} on {origin['device']}. {versions}."
    ]


def _balance(record: RunRecord) -> list[Any]:
    forgot = record.metrics["forgetting"]
    if not forgot:
        sentence = "What is forgotten was not measured."
    elif forgot["change"] is None:
        sentence = "What is forgotten is not known: the loss on general text is no number. Training diverged."
    else:
        sentence = (
            f"Forgotten: {forgot['change']:+.3f} ± {forgot['stderr']:.3f} nats per token of general text "
            f"({forgot['text']}, {forgot['tokens']:,} tokens)."
        )
    chart = balance(record.metrics["evaluation"], forgot, record.method)
    if chart is not None:
        return [Figure(chart, sentence)]
    return [sentence] if forgot else []


def _scores(record: RunRecord) -> list[Any]:
    evaluation = record.metrics["evaluation"]
    chart = accuracies(evaluation, record.method)
    figures: list[Any] = [] if chart is None else [Figure(chart, "Accuracy before and after training.")]
    table = score_table(evaluation, "Held-out data; losses are in nats per token.")
    return [*figures, table] if table.rows else []


def _losses(record: RunRecord) -> list[Any]:
    chart = losses(record.metrics["history"], record.metrics.get("evaluation", {}), record.method)
    return [] if chart is None else [Figure(chart, "Loss by optimizer step.")]


def _samples(record: RunRecord) -> list[Any]:
    names = {"question": "Prompt", **ANSWERS}
    return [
        {title: sample[name].strip() or "(nothing)" for name, title in names.items() if name in sample}
        for sample in record.metrics["samples"]
    ]


def _loading(record: RunRecord) -> list[Any]:
    adapter = record.folder.adapter
    if not adapter.is_dir():
        return ["adapter/ is not here: it was moved or deleted."] if record.whole else []
    loaded = WHOLE_MODEL
    if record.method != "full":
        config = PeftConfig.from_pretrained(str(adapter))
        loaded = loading_code(config, described_base(str(config.base_model_name_or_path)))
    return [code(loaded.replace("PATH", str(adapter))), code(f"smoa chat {record.folder.path}")]


SECTIONS: dict[str, Callable[[RunRecord], list[Any]]] = {
    "Run": _facts,
    "Learned and forgotten": _balance,
    "Held-out scores": _scores,
    "Loss": _losses,
    "Answers before and after": _samples,
    "Config": lambda record: [code(to_yaml(record.config))] if record.config else [],
    "Load it": _loading,
}
