"""Opens what a command is given: a finished run, a config file, or an adapter's folder, and its base model."""

from __future__ import annotations

import json
import logging
import os
from contextlib import suppress
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, load_peft_weights
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME as MODEL_CONFIG_NAME
from transformers.utils.hub import CHAT_TEMPLATE_FILE

import smoa  # noqa: F401  (registers SMoA with PEFT)
from smoa.errors import ConfigError, DataError, SmoaError, first_of
from smoa.files.names import PREFIX, embeddings_of
from smoa_lab.base_models import RunModel, base_content, packaged_name
from smoa_lab.basics.folders import read_stored
from smoa_lab.config.run import OLDER_DATA, ConfigText, ModelSection, RunConfig, load_config, native_dtype
from smoa_lab.training.run_folder import RunFolder

logger = logging.getLogger(__name__)

OF_FILES = 64
"""Characters of the hash of a base's files; for one of the Hub there is a commit, which is shorter."""


def open_run(
    place: str | Path, overrides: list[str] | None = None, base: str | None = None, untouched: bool = False
) -> tuple[RunConfig, Path | None]:
    """The config and the adapter of a finished run's folder; of a config file the config alone. ``base`` is used
    instead of the model that it names.

    A run that trained the whole model has no adapter; its config then names the trained model, or its base where that
    is asked for as ``untouched``.
    """
    path = Path(place)
    overrides = list(overrides or [])
    if base is not None:  # YAML would take the two halves into which JSON escapes an emoji as two characters
        overrides.append(f"model.name={json.dumps(base, ensure_ascii=False)}")
    if path.is_file():
        return load_config(path, overrides), None
    folder = RunFolder(path)
    if not folder.finished:
        raise ConfigError(f"{path}: is neither a config file nor the folder of a finished run (with metrics.json)")
    own = ConfigText.read(folder.config).values.get("data") or {}
    known = [f"data.{key}={json.dumps(value)}" for key, value in OLDER_DATA.items() if key not in own]
    template = folder.adapter / CHAT_TEMPLATE_FILE
    if own.get("template") and template.is_file():
        known.append(f"data.template={json.dumps(str(template), ensure_ascii=False)}")  # its file may have changed
    config = load_config(folder.config, [*known, *overrides])
    if config.method == "full" and not untouched:
        model = config.model.model_copy(update={"name": str(folder.adapter)})
        return config.model_copy(update={"model": model}), None
    config = config.model_copy(update={"model": trained_on(folder, config.model, base is not None)})
    return config, None if config.method == "full" else adapter_of_run(path)


def trained_on(run: RunFolder, model: ModelSection, is_given: bool) -> ModelSection:
    """The model that the run was trained on: of the Hub its commit. Raises ConfigError where the files of ``model``
    have another content; only warns if the user gave it, or if it isn't known."""
    if packaged_name(model.name) or not run.config.is_file():
        return model
    if not run.inputs.is_file():
        logger.warning("%s: doesn't keep which model it was trained on; %s may be another", run.path, model.name)
        return model
    content = str(read_stored(run.inputs, {"base model"})["base model"])
    place = Path(model.name).expanduser()
    if not place.exists():
        if is_given or content == str(None):
            return model
        if len(content) < OF_FILES:
            return model.model_copy(update={"options": {**model.options, "revision": content}})
        found = f"its base model {model.name!r} is not in {place.absolute().parent}"
    elif base_content(model) == content:
        return model
    else:
        found = f"was trained on another model than {place.absolute()}, or on other files of it"
    if not is_given:
        raise ConfigError(f"{run.path}: {found}; name it, or another to use all the same, with --base")
    logger.warning("%s: %s", run.path, found)
    return model


def adapter_of_run(place: str | Path) -> Path:
    """The folder with ``adapter_config.json``: ``place`` itself, or the adapter of the run in ``place``; raises
    ConfigError if neither has one."""
    for folder in (Path(place), RunFolder(Path(place)).adapter):
        if (folder / CONFIG_NAME).is_file():
            return folder
    raise ConfigError(f"{place}: contains no adapter ({CONFIG_NAME}), nor does {place}/adapter")


def run_name(place: str | Path) -> str:
    """What the run, or the adapter that lies in no run, in this folder is called."""
    folder = Path(os.path.abspath(place))  # noqa: PTH100 - of "." too, while a link keeps its name
    return folder.parent.name if folder == RunFolder(folder.parent).adapter else folder.name


def find_model(place: str, changes: dict[str, Any], template: str | None = None) -> RunModel:
    """The model of ``place``, a run, an adapter or a model, with its adapter if it has one. ``changes`` are laid over
    the model's section: ``name``, ``dtype``. Nothing is loaded yet."""
    path = Path(place).expanduser()
    if RunFolder(path).finished:
        config, adapter = open_run(path, base=changes.get("name"))
        return RunModel(config.model.model_copy(update=changes), template, adapter)
    try:
        adapter = adapter_of_run(path)
    except ConfigError as error:
        if path.is_dir() and not (path / MODEL_CONFIG_NAME).is_file():
            raise ConfigError(f"{error}, nor a model ({MODEL_CONFIG_NAME}), nor is it a finished run") from error
        return RunModel(ModelSection(name=place).model_copy(update=changes), template)
    section = model_of(adapter, changes.get("name")).section
    return RunModel(section.model_copy(update={"dtype": native_dtype(), **changes}), template, adapter)


def model_of(adapter: Path, base: str | None = None) -> RunModel:
    """The model of a saved adapter: ``base``, or the recorded one in the recorded revision, in float32, with the
    options of the run that it lies in; the base of a run that quantized it while loading as that run did."""
    config = adapter_config(adapter)
    name = base or config.base_model_name_or_path
    if name is None:
        raise ConfigError(f"{adapter / CONFIG_NAME}: records no base model; name it with --base")
    of_base = name == config.base_model_name_or_path  # the revision says nothing of another base
    options = {"revision": config.revision} if of_base and config.revision is not None else {}
    section, run = ModelSection(name=name, dtype="float32", options=options), RunFolder(adapter.parent)
    if adapter.name == run.adapter.name:
        section = trained_on(run, section, base is not None)
        with suppress(ConfigError, ValidationError):  # no config, or not one of a run
            model = ModelSection.model_validate(ConfigText.read(run.config).values.get("model"))
            if base is None and "quantization_config" in model.options:
                return RunModel(model.model_copy(update={"options": model.options | section.options}), adapter=adapter)
            own = {key: value for key, value in model.options.items() if key not in ("quantization_config", "revision")}
            section = section.model_copy(update={"options": {**own, **section.options}})
    return RunModel(section, adapter=adapter)


def with_saved_adapter(base: PreTrainedModel, adapter: Path) -> Any:
    """The base with the saved adapter of any method. It isn't the base model any more, switched off or unloaded
    either: some adapters train its biases, or take a part of its weights. Raises DataError where it doesn't fit."""
    check_weights(adapter)
    resize_as_saved(base, adapter)
    try:
        return PeftModel.from_pretrained(base, str(adapter))
    except SmoaError:
        raise
    except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:  # whatever PEFT and PyTorch raise
        raise DataError(f"{adapter}: cannot be loaded into this base: {shorten(str(error), 300)}") from error


def resize_as_saved(model: PreTrainedModel, adapter: Path) -> None:
    """Give the model as many tokens as the embeddings that an adapter saves have, if it saves any."""
    saved = load_peft_weights(str(adapter), device="cpu")
    for name, module in embeddings_of(model).items():
        own = saved.get(f"{PREFIX}{name}.weight")
        if own is not None and len(own) != len(module.weight):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # the rows of new tokens, which the adapter has, are the same in each base
                model.resize_token_embeddings(len(own), mean_resizing=False)
            break  # it resizes both


def check_weights(adapter: Path) -> None:
    """Raise DataError unless the adapter has its weights, all finite, in a whole safetensors file: a pickle is not
    read."""
    file = adapter / SAFETENSORS_WEIGHTS_NAME
    try:
        with safe_open(file, "pt") as tensors:
            names = tensors.keys()
            broken = [name for name in names if not tensors.get_tensor(name).float().isfinite().all()]
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file}: is not a whole safetensors file ({error}); save or fetch it again") from error
    if broken:
        raise DataError(f"{file}: {first_of(broken)}: holds NaN or infinite values; the adapter is broken")


def adapter_config(adapter: Path) -> PeftConfig:
    """The config of an adapter of any method; raises ConfigError if it is damaged."""
    try:
        config: PeftConfig = PeftConfig.from_pretrained(str(adapter))
    except SmoaError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        found = f"is missing, damaged or of a method that this PEFT lacks ({error!r})"
        raise ConfigError(f"{adapter / CONFIG_NAME}: {found}; fetch it again, or install a newer peft") from error
    return config
