"""A first config for a model and data: what ``smoa init`` writes, and ``smoa train --model --data`` trains."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from smoa.errors import ConfigError, DataError
from smoa_lab.base_models import RunModel, empty_model, load_tokenizer, positions_of
from smoa_lab.budget import ALL_LINEAR, FIRST_BLOCKS, budget_parameters, lora_on, size_method
from smoa_lab.config.methods import OTHER_LAYERS, find_method
from smoa_lab.config.run import Dtype, ModelSection, RunConfig, adapter_rate, check_config
from smoa_lab.config.validation import method_problems, refuse
from smoa_lab.config.yaml_text import apply_overrides, to_yaml
from smoa_lab.data.prepared import require_good_rows
from smoa_lab.training.loaded_run import read_rows_of
from smoa_lab.training.run_folder import in_free_folder

logger = logging.getLogger(__name__)

LENGTHS = 64
"""Tokens: a row is cut at a multiple of it."""
BATCH, ACCUMULATION = 4, 4
"""Rows computed at once, and how often before a step."""
EPOCHS = 3
LARGE = 1_000_000_000
"""Parameters of a model from which memory is scarcer than time."""
WIDEST = 44
"""Characters of a line of the config before its comment, where lines are not longer."""


def first_values(
    model: str, data: str, parameters: str = "lora:8", dtype: Dtype | None = None, changes: Sequence[str] = ()
) -> dict[str, Any]:
    """The config for a model and data: a named set, a file, a folder, or a data set of the Hub. Of the model no weights
    are read; rows are all read, as the ``data.key=value`` of ``changes`` say. The adapter is of the ``method=name``
    among them, and sized with the ``adapter.key=value``."""
    section = ModelSection(name=model)
    empty = empty_model(section)
    size = empty.num_parameters()
    method: dict[str, Any] = {"method": "smoa", "adapter": {}}
    apply_overrides(method, [change for change in changes if change.startswith(("method=", "adapter.", "adapter="))])
    name, own = str(method["method"]).lower(), method.pop("adapter")
    own = own if isinstance(own, dict) else {}  # which is refused with the rest
    kind = find_method(name).peft_type
    adapter: dict[str, Any] = {} if kind is None or name in OTHER_LAYERS else {"target_modules": ALL_LINEAR}
    adapter |= {"num_blocks": FIRST_BLOCKS} if kind == "smoa" else {}
    given = {**adapter, **own}
    refuse("smoa train", method_problems({"method": name, "adapter": given}))
    if adapter and find_method(name).budget_key not in own:
        budget = budget_parameters(parameters, size, lora_on(empty, given))
        sized = size_method(empty, name, given, budget)
        if why := sized.misses(budget, parameters):
            if sized.parameters is None:
                raise ConfigError(f"method: {why}")
            logger.warning("method: %s; what is trained is of another size than with other methods", why)
        adapter |= sized.adapter
    if kind in ("smoa", "lora"):
        adapter["alpha" if kind == "smoa" else "lora_alpha"] = 2 * {**adapter, **own}["r"]
    block, rows = look_at_rows(data, section, positions_of(empty.config), changes)
    tenth = EPOCHS * math.ceil(rows / (BATCH * ACCUMULATION)) // 10
    return {
        "model": {"name": model, **({"dtype": dtype} if dtype else {})},  # else the machine and the method decide
        **method,
        **({"adapter": adapter} if adapter else {}),
        "trainer": "sft",
        "data": block,
        "training": {
            "output_dir": f"runs/{file_for(data).stem}",
            "num_train_epochs": EPOCHS,
            "per_device_train_batch_size": BATCH,
            "gradient_accumulation_steps": ACCUMULATION,
            "gradient_checkpointing": size > LARGE,
            "learning_rate": adapter_rate(size),
            "logging_steps": max(1, min(10, tenth)),
            "seed": 0,
        },
    }


def look_at_rows(
    place: str, section: ModelSection, context: int | None, changes: Sequence[str] = ()
) -> tuple[dict[str, Any], int]:
    """The ``data`` block, and how many rows there are to train on."""
    lent = {} if load_tokenizer(section).chat_template else {"template": "alpaca"}
    data = {"train": place, **lent, "max_length": context}
    values: dict[str, Any] = {"model": {"name": section.name}, "data": data, "training": {}}
    apply_overrides(values, [change for change in changes if change.startswith("data.")])
    config = check_config(values, place)
    _, rows = read_rows_of(config, RunModel.of(config).tokenizer)
    account = rows.account
    require_good_rows(account, config.data.skip_bad_rows)
    if not (number := account["parts"].get("train", 0)):
        raise DataError(f"{place}: leaves no rows to train on")
    (first, *_) = rows.rows("train")
    length = -(-account["tokens"]["p99"] // LENGTHS) * LENGTHS
    template = {} if first.is_text else lent
    block = {"train": place, "format": account["format"], **template, "max_length": min(length, context or length)}
    return block, number


def default_run(model: str, data: str, changes: Sequence[str] = ()) -> RunConfig:
    """The run that ``smoa init`` writes for a model and data, with ``key.key=value`` changes, in the first of the
    folders ``runs/NAME``, ``runs/NAME-2`` and so on without a finished run."""
    values = first_values(model, data, changes=changes)
    folder = values["training"]["output_dir"]
    apply_overrides(values, changes)
    config = check_config(values, "smoa train")
    return in_free_folder(config) if config.training["output_dir"] == folder else config


def file_for(data: str) -> Path:
    """The config's file, NAME.yaml for data called NAME."""
    return Path(f"{Path(data.rstrip('/')).name.partition('.')[0] or 'run'}.yaml")


def config_text(file: Path, values: dict[str, Any]) -> str:
    """The config as YAML, with how to run it on top and a comment beside every key."""
    comments = Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8").splitlines()
    notes = dict(line.strip().split(":  # ") for line in comments[1:])
    command = f"smoa train {quote(file.as_posix())}"
    lines = [f"# Run it: {command}; change a value: {command} training.max_steps=10"]
    for line in to_yaml(values).splitlines():
        note = notes.get(line.strip().partition(":")[0])
        lines += [] if line[0] == " " else [""]
        lines.append(line if note is None else f"{line:<{WIDEST}}  # {note}")
    return "\n".join(lines) + "\n"
