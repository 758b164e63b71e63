"""Writes the README.md of a saved adapter: base model, how to load it, results, settings.

Cards name a base model by its Hub id, or a local one by its last name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # it lists no exports
from peft import PeftConfig

from smoa.config import SmoaConfig

AUTO_CLASSES = {
    "CAUSAL_LM": ("AutoModelForCausalLM", "text-generation"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", None),
    "SEQ_CLS": ("AutoModelForSequenceClassification", "text-classification"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "token-classification"),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", "question-answering"),
    "FEATURE_EXTRACTION": ("AutoModel", "feature-extraction"),
}
"""transformers' class and the Hub's task name for each task type."""

BASE_TAG = "base_model:adapter:"
"""How the tag of an adapter's base starts."""

NOT_SHOWN = ("base_model_name_or_path", "inference_mode", "revision")

TEXT = """---
{front_matter}
---

# {title}

{intro}

```python
{loading}
```

{sections}## Adapter

```json
{config}
```

The base model's license and terms of use apply.
"""
BY_NAME = """from peft import {auto_peft}

model = {auto_peft}.from_pretrained("PATH")"""
ON_A_BASE = """from peft import PeftModel
from transformers import {auto}

model = PeftModel.from_pretrained({auto}.from_pretrained("{base}"), "PATH")"""
LOCAL = """The base was loaded from a local place. If `adapter_config.json` does not lead to it, load it yourself and
call `PeftModel.from_pretrained(base, "PATH")`.

"""


def adapter_card(
    title: str, config: PeftConfig, metrics: Mapping[str, float], base: NamedBase | None = None, sections: str = ""
) -> str:
    """Markdown with the front matter that model hubs read.

    Args:
        title: The heading.
        config: The adapter's config as saved, of any PEFT method.
        metrics: A table of results; none if empty.
        base: Name of the base model, if it is not the place that the config records.
        sections: More Markdown, put before the settings.
    """
    base = base or named_base(config.base_model_name_or_path)
    rows = "".join(f"| {name} | {value:.4g} |\n" for name, value in metrics.items())
    results = f"## Results\n\n| metric | value |\n|---|---|\n{rows}\n" if metrics else ""
    intro = f"A {method_name(config)} adapter of `{base.text}`, for PEFT."
    if isinstance(config, SmoaConfig):
        by_layer = " in layers for which its config gives no other number" if config.num_blocks_pattern else ""
        paper = "[arXiv:2605.21147](https://arxiv.org/abs/2605.21147)"
        intro = f"A SMoA adapter ({paper}) of `{base.text}`: r = {config.r}, {config.num_blocks} blocks{by_layer}."
    tags = [method_name(config).lower(), *([BASE_TAG + base.hub_id] if base.hub_id else [])]
    front_matter = {"library_name": "peft", "pipeline_tag": auto_class(config)[1], "tags": tags}
    sections = ("" if base.hub_id else LOCAL) + results + sections
    return card_text(title, base, config, front_matter, intro, loading_code(config, base), sections)


def card_text(
    title: str,
    base: NamedBase,
    config: PeftConfig,
    front_matter: Mapping[str, Any],
    intro: str,
    loading: str,
    sections: str,
) -> str:
    """The card of an adapter or a merged model: front matter, heading, introduction, how to load it, settings."""
    values: dict[str, Any] = config.to_dict()
    shown = {
        key: sorted(value) if isinstance(value, set) else getattr(value, "value", value)
        for key, value in values.items()
        if value not in (None, {}, [], False) and key not in NOT_SHOWN
    }
    known: dict[str, Any] = {**front_matter} | ({"base_model": base.hub_id} if base.hub_id else {})
    return TEXT.format(
        front_matter=ModelCardData(**known).to_yaml(),
        title=title,
        intro=intro,
        loading=loading,
        sections=sections,
        config=json.dumps(shown, indent=2, sort_keys=True),
    )


@dataclass(frozen=True)
class NamedBase:
    """A base model in words, and its id on the Hub, to which a card's front matter links, or None."""

    text: str
    hub_id: str | None


def named_base(source: str | None) -> NamedBase:
    """The name of a base that was loaded from `source`.

    Of a local folder or file only the last name: the rest is of this machine, and the Hub can't link to it.
    """
    if not source:
        return NamedBase("a model without a name", None)
    try:
        validate_repo_id(source)
    except HFValidationError:
        is_hub_id = False
    else:
        is_hub_id = not source.endswith(".gguf") and not Path(source).exists()
    return (
        NamedBase(source, source) if is_hub_id else NamedBase(PureWindowsPath(source).name, None)
    )  # splits at / and \


def auto_class(config: PeftConfig) -> tuple[str, str | None]:
    """Name of transformers' class for the adapter's task, and the Hub's name of the task, if it has one."""
    return AUTO_CLASSES.get(str(getattr(config.task_type, "value", config.task_type)), ("AutoModel", None))


def loading_code(config: PeftConfig, base: NamedBase) -> str:
    """Python that loads the adapter from "PATH". PEFT finds the base in the config, unless that names another place
    than the Hub's."""
    auto, task = auto_class(config)
    registers = "import smoa  # registers SMoA with PEFT\n" if isinstance(config, SmoaConfig) else ""
    if base.hub_id in (None, config.base_model_name_or_path):
        suffix = "ForFeatureExtraction" if task == "feature-extraction" else ""
        return registers + BY_NAME.format(auto_peft=auto.replace("AutoModel", "AutoPeftModel") + suffix)
    return registers + ON_A_BASE.format(auto=auto, base=base.hub_id)


def method_name(config: PeftConfig) -> str:
    """PEFT's name of the adapter's method, in capitals."""
    return str(getattr(config.peft_type, "value", config.peft_type))
