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
from smoa.errors import ConfigError, SmoaError
from smoa.files.card import loading_code
from smoa_lab.basics.plain import without_secrets
from smoa_lab.config.methods import METHODS
from smoa_lab.config.yaml_text import parse_yaml, to_yaml
from smoa_lab.models.packaged_models import described_base
from smoa_lab.pages.run_card import ANSWERS
from smoa_lab.pages.run_charts import accuracies, balance, learning_rate, losses
from smoa_lab.pages.tables import score_table
from smoa_lab.pages.templates import Figure, code, page, warning, write_page
from smoa_lab.training.run_folder import RunFolder

KEYS = ("parameters", "training", "provenance", "evaluation", "forgetting", "history", "samples")
"""What the metrics of a finished run have, and those of older versions may not."""
WHOLE_MODEL = 'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("PATH")'


@dataclass(frozen=True)
class RunRecord:
    """A run: its metrics as far as they are known, its config as text, and a sentence for each file that is missing or
    damaged. ``whole`` is whether the metrics are those of a finished run."""

    folder: RunFolder
    metrics: dict[str, Any]
    config: str
    missing: list[str]
    whole: bool

    @property
    def method(self) -> str:
        """The method's name; empty if it is not known."""
        try:
            return str(parse_yaml(self.config, self.folder.config).get("method", "smoa"))
        except (SmoaError, AttributeError):
            return ""


def report_run(place: str | Path, output: Path | None = None) -> tuple[Path, list[str]]:
    """Write the page of the run in the folder ``place`` into it, or as ``output``; where it is, and what is missing.

    Raises:
        ConfigError: ``place`` is not the folder of a run.
    """
    record = read_run(place)
    file = output or record.folder.report
    check_place(file)
    text, missing = run_page(record)
    write_page(file, text)
    return file, missing


def read_run(place: str | Path) -> RunRecord:
    """The record of the run in the folder ``place``.

    Raises:
        ConfigError: the folder has neither metrics nor a config.
    """
    folder = RunFolder(Path(place))
    if not folder.metrics.is_file() and not folder.config.is_file():
        raise ConfigError(f"{place}: is not the folder of a run: contains neither metrics.json nor config.yaml")
    metrics, problem = _metrics(folder)
    config, lack = _config(folder, metrics)
    missing = [sentence for sentence in (problem, lack) if sentence]
    return RunRecord(folder, metrics, config, missing, whole=problem is None)


def _metrics(folder: RunFolder) -> tuple[dict[str, Any], str | None]:
    """The metrics, or what the last checkpoint logged and what is wrong with the metrics."""
    problem = "The run is not finished: metrics.json is missing. Run the same smoa train again to go on with it."
    if folder.metrics.exists():
        try:
            metrics = json.loads(folder.metrics.read_text(encoding="utf-8"))
            if isinstance(metrics, dict):
                return without_secrets(metrics), None
            fault = f"it is a {type(metrics).__name__}, not an object"
        except ValueError as error:
            fault = str(error)
        problem = f"metrics.json is damaged: {fault}. smoa eval scores the adapter again."
    checkpoint = get_last_checkpoint(str(folder.path))
    try:
        state = json.loads(Path(checkpoint or folder.path, TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        return {"history": state["log_history"]}, problem
    except (OSError, ValueError, KeyError, TypeError):
        return {}, problem


def _config(folder: RunFolder, metrics: dict[str, Any]) -> tuple[str, str | None]:
    """The config's text, or that of the metrics and what is wrong with the file."""
    kept = to_yaml(metrics["config"]) if isinstance(metrics.get("config"), dict) else ""
    instead = " What is shown of it is from metrics.json." if kept else ""
    if not folder.config.is_file():
        return kept, f"config.yaml is missing.{instead}"
    try:
        shown = without_secrets(parse_yaml(folder.config.read_text(encoding="utf-8"), folder.config))
    except ValueError as error:  # neither UTF-8 nor YAML
        return kept, f"config.yaml is damaged: {error}.{instead}"
    return to_yaml(shown), None


def run_page(record: RunRecord) -> tuple[str, list[str]]:
    """The HTML with everything that the record has, and a sentence for each thing that is missing."""
    builders: dict[str, Callable[[RunRecord], list[Any]]] = {
        "Run": _facts,
        "Learned and forgotten": _balance,
        "Held-out scores": _scores,
        "Loss": _losses,
        "Answers before and after": _samples,
        "Config": lambda record: [code(record.config)] if record.config else [],
        "Load it": _loading,
    }
    sections: dict[str, list[Any]] = {}
    faults: dict[str, Exception] = {}
    for title, build in builders.items():
        try:
            sections[title] = build(record)
        except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
            faults[title] = error
    missing = [*record.missing, *_lacking(record, faults)]
    introduction = [*([warning(" ".join(missing))] if missing else []), *sections.pop("Run", [])]
    shown = [(title, parts) for title, parts in sections.items() if parts]
    return page(record.folder.path.resolve().name, shown, introduction), missing


def _lacking(record: RunRecord, faults: dict[str, Exception]) -> list[str]:
    """A sentence for each kind of fault; what is said of metrics.json already is not said again."""
    lines, adapter = [], faults.pop("Load it", None)
    absent = [key for key in KEYS if key not in record.metrics]  # as in those of an older version
    damaged = [
        title for title, fault in faults.items() if not (isinstance(fault, KeyError) and fault.args[0] in absent)
    ]
    if absent and record.whole:
        try:
            writer = f"smoa {record.metrics['provenance']['versions']['smoa']}"
        except (KeyError, TypeError):
            writer = "another version of smoa"
        lines.append(f"metrics.json has no {', '.join(absent)}: it was written by {writer}.")
    if damaged and record.whole:
        lines.append(f"metrics.json is damaged in what it has about: {', '.join(damaged)}.")
    if adapter:
        lines.append(f"adapter/ is damaged: {adapter}.")
    return lines


def _facts(record: RunRecord) -> list[Any]:
    parameters, training, origin = (record.metrics[key] for key in ("parameters", "training", "provenance"))
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items() if version)
    return [
        f"{record.method}, {parameters['trainable']:,} of {parameters['total']:,} parameters trained, "
        f"{training['steps']} steps in {training['seconds']:.0f} s on {origin['device']}. {versions}."
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
    history, evaluation = record.metrics["history"], record.metrics.get("evaluation", {})
    charts = {
        "Loss on trained tokens, in nats per token.": losses(history, evaluation, record.method),
        "Learning rate.": learning_rate(history, record.method),
    }
    return [Figure(chart, caption) for caption, chart in charts.items() if chart is not None]


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
    loaded, method = WHOLE_MODEL, METHODS.get(record.method)
    if method is None or method.config is not None:
        config = PeftConfig.from_pretrained(str(adapter))
        loaded = loading_code(config, described_base(str(config.base_model_name_or_path)))
    return [code(loaded.replace("PATH", str(adapter))), code(f"smoa chat {record.folder.path}")]
