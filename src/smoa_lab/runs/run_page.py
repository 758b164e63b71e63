"""The page of one run: scores, loss, answers before and after, what was forgotten, the config, and how to load it."""

from __future__ import annotations

import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftConfig

from smoa.atomic import check_place
from smoa.files.card import loading_code
from smoa_lab.config.methods import METHODS
from smoa_lab.drawing.pages import Html, code, figure, page, paragraph, section, table, write_page
from smoa_lab.models.packaged_models import described_base
from smoa_lab.runs.run_record import RunRecord, read_run
from smoa_lab.training.run_charts import STAGES, accuracies, balance, learning_rate, losses
from smoa_lab.training.samples import NAMES

KEYS = ("parameters", "training", "provenance", "evaluation", "forgetting", "history", "samples")
"""What the metrics of a finished run have, and those of older versions may not."""
LOADING = "Load it"
WHOLE_MODEL = 'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("PATH")'


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


def run_page(record: RunRecord) -> tuple[str, list[str]]:
    """The HTML with everything that the record has, and a sentence for each thing that is missing."""
    sections: dict[str, Callable[[RunRecord], list[str]]] = {
        "": _facts,
        "Learned and forgotten": _balance,
        "Held-out scores": _scores,
        "Loss": _losses,
        "Answers before and after": _samples,
        "Config": lambda record: [code(record.config)] if record.config else [],
        LOADING: _loading,
    }
    parts: list[str] = []
    faults: dict[str, Exception] = {}
    for title, build in sections.items():
        try:
            found = build(record)
        except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
            faults[title] = error
            continue
        parts += [section(title, *found) if title else found[0]] if found else []
    missing = [*record.missing, *_lacking(record, faults)]
    told = [Html(f'<p class="missing">{html.escape(" ".join(missing))}</p>')] if missing else []
    return page(record.name, *told, *parts), missing


def _lacking(record: RunRecord, faults: dict[str, Exception]) -> list[str]:
    """A sentence for each kind of fault; what is said of metrics.json already is not said again."""
    lines, of_metrics = [], {title: fault for title, fault in faults.items() if title != LOADING and record.whole}
    absent = [str(fault.args[0]) for fault in of_metrics.values() if _is_absent(fault, record)]
    damaged = [title or "Run" for title, fault in of_metrics.items() if not _is_absent(fault, record)]
    if absent:
        lines.append(f"metrics.json has no {', '.join(dict.fromkeys(absent))}: it was written by {_writer(record)}.")
    if damaged:
        lines.append(f"metrics.json is damaged in what it has about: {', '.join(damaged)}.")
    if LOADING in faults:
        lines.append(f"adapter/ is damaged: {faults[LOADING]}.")
    return lines


def _writer(record: RunRecord) -> str:
    try:
        return f"smoa {record.metrics['provenance']['versions']['smoa']}"
    except (KeyError, TypeError):
        return "another version of smoa"


def _is_absent(fault: Exception, record: RunRecord) -> bool:
    """Whether a whole part of the metrics is not there, as in those of an older version."""
    return isinstance(fault, KeyError) and fault.args[0] in KEYS and fault.args[0] not in record.metrics


def _facts(record: RunRecord) -> list[str]:
    parameters, training, origin = (record.metrics[key] for key in ("parameters", "training", "provenance"))
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items() if version)
    return [
        paragraph(
            f"{record.method}, {parameters['trainable']:,} of {parameters['total']:,} parameters trained, "
            f"{training['steps']} steps in {training['seconds']:.0f} s on {origin['device']}. {versions}."
        )
    ]


def _balance(record: RunRecord) -> list[str]:
    forgot = record.metrics["forgetting"]
    drawn = balance(record.metrics["evaluation"], forgot, record.method)
    if drawn is None:
        return [paragraph(_forgotten(forgot))] if forgot else []
    return [figure(drawn, _forgotten(forgot))]


def _forgotten(forgot: dict[str, Any] | None) -> str:
    if not forgot:
        return "What is forgotten was not measured."
    if forgot["change"] is None:
        return "What is forgotten is not known: the loss on general text is no number. Training diverged."
    return (
        f"Forgotten: {forgot['change']:+.3f} ± {forgot['stderr']:.3f} nats per token of general text "
        f"({forgot['text']}, {forgot['tokens']:,} tokens)."
    )


def _scores(record: RunRecord) -> list[str]:
    evaluation = record.metrics["evaluation"]
    drawn = accuracies(evaluation, record.method)
    stages = [stage for stage in STAGES if stage in evaluation]
    if not stages:
        return []
    names = [name for name in next(iter(evaluation[stages[0]].values())) if not name.endswith("_stderr")]
    rows = [
        (task, stage, *(_number(scores.get(name)) for name in names))
        for task in evaluation[stages[0]]
        for stage in stages
        for scores in [evaluation[stage][task]]
    ]
    header = ["", "training", *(name.replace("_", " ") for name in names)]
    shown = [] if drawn is None else [figure(drawn, "Accuracy before and after training.")]
    return [*shown, table("Held-out data; losses are in nats per token.", header, rows)]


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else f"{value:,}"


def _losses(record: RunRecord) -> list[str]:
    history, evaluation = record.metrics["history"], record.metrics.get("evaluation", {})
    charts = {
        "Loss on trained tokens, in nats per token.": losses(history, evaluation, record.method),
        "Learning rate.": learning_rate(history, record.method),
    }
    return [figure(chart, caption) for caption, chart in charts.items() if chart is not None]


def _samples(record: RunRecord) -> list[str]:
    return [_sample(sample) for sample in record.metrics["samples"]]


def _sample(sample: dict[str, str]) -> Html:
    told = {"Prompt": sample["question"], **{title: sample[name] for name, title in NAMES.items() if name in sample}}
    lines = (f"<dt>{name}</dt><dd>{html.escape(text.strip() or '(nothing)')}</dd>" for name, text in told.items())
    return Html(f'<dl class="sample">{"".join(lines)}</dl>')


def _loading(record: RunRecord) -> list[str]:
    adapter = record.folder.adapter
    if not adapter.is_dir():
        return [] if not record.whole else [paragraph("adapter/ is not here: it was moved or deleted.")]
    loaded, method = WHOLE_MODEL, METHODS.get(record.method)
    if method is None or method.config is not None:
        config = PeftConfig.from_pretrained(str(adapter))
        loaded = loading_code(config, described_base(str(config.base_model_name_or_path)))
    return [code(loaded.replace("PATH", str(adapter))), code(f"smoa chat {record.folder.path}")]
