"""Opens what ``smoa chat`` is given: a run, an adapter or a model, and the template to talk through."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but in no __all__
from peft.utils import CONFIG_NAME
from transformers.utils import CONFIG_NAME as MODEL_CONFIG_NAME

from smoa.atomic import recover
from smoa.errors import ConfigError
from smoa_lab.chat.speaker import Speaker, Writing, chat_template
from smoa_lab.config.run import ModelSection, native_dtype
from smoa_lab.data.questions import Template
from smoa_lab.models.base_models import load_base_model, load_tokenizer
from smoa_lab.models.packaged_models import PACKAGED_MODELS
from smoa_lab.runs.open_run import adapter_of_run, base_section, open_run, recorded_base, trained_template
from smoa_lab.training.run_folder import RunFolder


@dataclass(frozen=True)
class Found:
    """What to load. Nothing is loaded yet."""

    model: ModelSection
    adapter: Path | None
    template: Template
    forced: bool = False
    """Whether the template is what the command says, for all adapters."""


def find(place: str, changes: dict[str, Any], template: Template | None = None) -> Found:
    """What ``place`` is. ``changes`` are laid over the model's section: ``name``, ``dtype``, ``trust_remote_code``.

    A run is talked to through the template that it was trained with, everything else through the model's own.

    Raises:
        ConfigError: ``place`` is none of the things to talk to.
    """
    path = Path(place).expanduser()
    if RunFolder(path).finished:
        config, adapter = open_run(path, trust_remote_code=changes.get("trust_remote_code", False))
        model = config.model.model_copy(update=changes)
        return Found(model, adapter, template or trained_template(path), template is not None)
    adapter = _adapter(path)
    if adapter is None:
        _check_model(path, place)
        model = ModelSection(name=place)
    else:
        model = base_section(adapter, changes.get("name")).model_copy(update={"dtype": native_dtype()})
    return Found(model.model_copy(update=changes), adapter, template or "chat", template is not None)


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
    template = chat_template(
        tokenizer, tokenizer.chat_template, found.adapter, found.template
    )  # fails before the weights are read
    model, _ = load_base_model(found.model)
    if torch.cuda.is_available() and not (hasattr(model, "hf_device_map") or getattr(model, "is_quantized", False)):
        model.to("cuda")  # type: ignore[arg-type]
    recorded = None if found.adapter is None else recorded_base(found.adapter)
    bases = [found.model.name, recorded or found.model.name]
    speaker = Speaker(model, tokenizer, writing, bases, found.template if found.forced else None)
    speaker.talk_through(template)
    if found.adapter is not None:
        speaker.load(str(found.adapter), found.model.name, found.template)
    return speaker
