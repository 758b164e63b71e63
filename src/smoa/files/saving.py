"""Saves an adapter so that a kill leaves the old one or the new one, whole.

PEFT's `save_pretrained` writes one file after another into the folder. Here it writes into another folder, whose files
then take their places together (atomic.py).
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from peft.utils import CONFIG_NAME

from smoa.atomic import new_files
from smoa.config import SmoaConfig
from smoa.errors import ConfigError
from smoa.files.card import BASE_TAG, adapter_card

MODEL_CARD = "README.md"


def save_adapter(
    model: Any,
    folder: str | Path,
    *,
    base_model_name: str | None = None,
    metrics: Mapping[str, float] | None = None,
    **options: Any,
) -> None:
    """Call `model.save_pretrained(folder)` so that a kill or a full disk leaves the old adapter or the new one, whole.

    Other files in the folder are not touched, so they may be open. The new files are written into a hidden folder
    inside, flushed to the disk, and moved to their places together. If a kill interrupts this, the next load or save
    completes it.

    Args:
        model: A `PeftModel`, or a transformers model with an adapter.
        folder: Created if it does not exist.
        base_model_name: Name of the base model for `adapter_config.json` and the model card, instead of the path it
            was loaded from.
        metrics: Results, which may be empty. If given, each saved adapter gets a model card with base model,
            settings, these results and how to load it, instead of PEFT's template.
        options: Passed to `save_pretrained`.

    Raises:
        NotADirectoryError: `folder` is a file.
        ConfigError: `metrics` is given, and an adapter of the model is not a SMoA adapter.
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target}: is a file; give a folder")
    others = [name for name, config in model.peft_config.items() if not isinstance(config, SmoaConfig)]
    if metrics is not None and others:
        raise ConfigError(
            f"metrics: {others[0]} is not a SMoA adapter; leave metrics out to save it with PEFT's model card"
        )
    if not options.get("is_main_process", True):  # takes part in gathering and keeps nothing
        with tempfile.TemporaryDirectory() as nowhere:
            model.save_pretrained(nowhere, **options)
        return
    with new_files(target) as temporary:
        if (target / MODEL_CARD).is_file():
            shutil.copy(target / MODEL_CARD, temporary)  # PEFT edits the card
        model.save_pretrained(temporary, **options)
        for file in temporary.rglob(CONFIG_NAME):
            if base_model_name is not None:
                _rename_base(file, temporary / MODEL_CARD, base_model_name)
            if metrics is not None:
                config = SmoaConfig.from_pretrained(file.parent)
                card = adapter_card(target.resolve().name, config, metrics)
                (file.parent / MODEL_CARD).write_text(card, encoding="utf-8")


def _rename_base(file: Path, card_file: Path, name: str) -> None:
    config = json.loads(file.read_text(encoding="utf-8"))
    old, config["base_model_name_or_path"] = config.get("base_model_name_or_path"), name
    file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    if card_file.is_file():
        card = ModelCard.load(card_file)
        card.data.base_model = name
        card.data.tags = [BASE_TAG + name if tag.startswith(BASE_TAG) else tag for tag in card.data.tags or []] or None
        if old and {"/", "\\"} & set(old):  # a name without one may be any word of the text
            card.text = card.text.replace(old, name)
        card.save(card_file)
