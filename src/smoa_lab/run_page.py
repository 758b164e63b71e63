"""The page of one run: scores, loss, answers before and after, what was forgotten, the config, and how to load it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from smoa.atomic import write_whole
from smoa.errors import ConfigError, DataError
from smoa_lab.base_models import described_base
from smoa_lab.basics.folders import check_place, read_stored
from smoa_lab.config.run import ConfigText
from smoa_lab.config.yaml_text import to_yaml
from smoa_lab.open_run import adapter_config
from smoa_lab.pages.card import loading_code
from smoa_lab.pages.run_report import ANSWERS, losses
from smoa_lab.pages.tables import metric_table, outcome, steps_text
from smoa_lab.pages.templates import Figure, code, page
from smoa_lab.training.run_folder import RunFolder

WHOLE_MODEL = 'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("PATH")'
NAMES = {"question": "Prompt", **ANSWERS}
"""What a sample's texts are called."""


def report_run(place: str | Path, output: Path | None = None) -> Path:
    """Write the page of the run in the folder ``place`` into it, or as ``output``, and return where it is. Of a run
    that is not finished it has the config, and the loss until the last checkpoint."""
    folder = RunFolder(Path(place))
    if not folder.config.is_file():
        raise ConfigError(f"{place}: is not the folder of a run: contains no config.yaml")
    file = output or folder.report
    check_place(file, is_new=output is not None)
    config = ConfigText.read(folder.config).values
    method = str(config.get("method", "smoa"))
    metrics: dict[str, Any] = {"history": [], "evaluation": {}, "gain": None, "forgetting": None, "samples": []}
    introduction = "The run is not finished. Run the same smoa train again to go on with it."
    if folder.finished:
        metrics = read_stored(folder.metrics, {*metrics, "parameters", "training", "provenance"})
        parameters, training, origin = (metrics[key] for key in ("parameters", "training", "provenance"))
        versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items() if version)
        introduction = (
            f"{method}, {parameters['trainable']:,} of {parameters['total']:,} parameters trained, "
            f"{steps_text(training)} on {origin['device']}. {versions}."
        )
    elif (checkpoint := get_last_checkpoint(str(folder.path))) is not None:
        with suppress(DataError):  # of a run that was killed while it wrote
            metrics["history"] = read_stored(Path(checkpoint, TRAINER_STATE_NAME), {"log_history"})["log_history"]
    evaluation = metrics["evaluation"]
    loss = losses(metrics["history"], evaluation, method, metrics.get("training"))
    sections: dict[str, list[Any]] = {
        "Learned and forgotten": outcome(metrics),
        "Held-out scores": [metric_table(evaluation, "Losses are in nats per token.")] if evaluation else [],
        "Loss": [] if loss is None else [Figure(loss, "Loss by optimizer step.")],
        "Answers before and after": [
            {title: sample[name].strip() or "(nothing)" for name, title in NAMES.items() if name in sample}
            for sample in metrics["samples"]
        ],
    }
    sections["Config"] = [code(to_yaml(config))]
    if folder.adapter.is_dir():
        loaded = WHOLE_MODEL
        if method != "full":
            saved = adapter_config(folder.adapter)
            loaded = loading_code(saved, described_base(str(saved.base_model_name_or_path)))
        sections["Load it"] = [
            code(loaded.replace("PATH", str(folder.adapter))),
            code(f"smoa chat {quote(folder.path.as_posix())}"),
        ]
    shown = [(title, parts) for title, parts in sections.items() if parts]
    write_whole(file, page(folder.path.resolve().name, shown, [introduction]))
    return file
