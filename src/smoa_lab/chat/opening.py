"""Opens what ``smoa chat`` is given: a run, an adapter or a model, and the template to talk through."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but in no __all__
from peft.utils import CONFIG_NAME
from transformers import PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME as MODEL_CONFIG_NAME

from smoa.atomic import recover
from smoa.errors import ConfigError, DataError
from smoa_lab.chat.speaker import Speaker, Writing
from smoa_lab.config.run_config import ModelSection, RunConfig, native_dtype
from smoa_lab.data.prompts import Template
from smoa_lab.models.base_models import load_base_model, load_tokenizer
from smoa_lab.models.packaged_models import PACKAGED_MODELS
from smoa_lab.runs.open_run import adapter_of_run, base_section, open_run, recorded_base
from smoa_lab.tokens.chat_templates import saved_chat_template, set_chat_template, stop_at_turns_end
from smoa_lab.training.run_folder import RunFolder


@dataclass(frozen=True)
class Found:
    """What to load. Nothing is loaded yet."""

    model: ModelSection
    adapter: Path | None
    template: Template


def find(place: str, changes: dict[str, Any], template: Template | None = None) -> Found:
    """What ``place`` is. ``changes`` are laid over the model's section: ``name``, ``dtype``, ``trust_remote_code``.

    A run is talked to through the template that it was trained with, everything else through the model's own.

    Raises:
        ConfigError: ``place`` is none of the things to talk to.
    """
    path = Path(place).expanduser()
    if RunFolder(path).finished:
        config, adapter = open_run(path)
        trained = config.task.template if isinstance(config, RunConfig) else "chat"
        return Found(config.model.model_copy(update=changes), adapter, template or trained)
    adapter = _adapter(path)
    if adapter is None:
        _check_model(path, place)
        model = ModelSection(name=place)
    else:
        model = base_section(adapter, changes.get("name")).model_copy(update={"dtype": native_dtype()})
    return Found(model.model_copy(update=changes), adapter, template or "chat")


def _adapter(path: Path) -> Path | None:
    recover(path)
    has_one = any((folder / CONFIG_NAME).is_file() for folder in (path, RunFolder(path).adapter))
    return adapter_of_run(path) if has_one else None


def _check_model(path: Path, place: str) -> None:
    """Raise ConfigError unless ``place`` can be a whole model."""
    if path.is_file() and place.endswith(".gguf"):
        return
    if path.exists():
        if not (path / MODEL_CONFIG_NAME).is_file():
            raise ConfigError(
                f"{place}: contains no finished run (metrics.json), adapter ({CONFIG_NAME}) or model "
                f"({MODEL_CONFIG_NAME})"
            )
        return
    try:
        validate_repo_id(place)
    except HFValidationError:
        raise ConfigError(
            f"{place}: no such folder; give the folder of a run, of an adapter or of a model, a Hub id, "
            f"or one of {', '.join(sorted(PACKAGED_MODELS))}"
        ) from None


def load(found: Found, writing: Writing) -> Speaker:
    """The model, with the adapter if there is one.

    Raises:
        DataError: model or adapter cannot be loaded, or the model has no chat template.
    """
    tokenizer = load_tokenizer(found.model)
    _set_template(tokenizer, found)
    model, _ = load_base_model(found.model)
    stop_at_turns_end(model, tokenizer)
    if torch.cuda.is_available() and not (hasattr(model, "hf_device_map") or getattr(model, "is_quantized", False)):
        model.to("cuda")  # type: ignore[arg-type]
    recorded = None if found.adapter is None else recorded_base(found.adapter)
    speaker = Speaker(model, tokenizer, writing, [found.model.name, recorded or found.model.name])
    if found.adapter is not None:
        speaker.load(str(found.adapter), found.model.name)
    return speaker


def _set_template(tokenizer: PreTrainedTokenizerBase, found: Found) -> None:
    if found.template == "alpaca":
        set_chat_template(tokenizer, "alpaca")
        return
    if found.adapter is not None:
        tokenizer.chat_template = saved_chat_template(found.adapter) or tokenizer.chat_template
    if not tokenizer.chat_template:
        raise DataError(f"{found.model.name}: its tokenizer has no chat template; use --template alpaca")
