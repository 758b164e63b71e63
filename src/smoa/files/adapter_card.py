"""Writes the README.md of a saved adapter: base model, how to load it, results, settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData
from peft import PeftConfig

LOADERS = {
    "CAUSAL_LM": ("AutoPeftModelForCausalLM", "text-generation"),
    "SEQ_2_SEQ_LM": ("AutoPeftModelForSeq2SeqLM", None),
    "SEQ_CLS": ("AutoPeftModelForSequenceClassification", "text-classification"),
    "TOKEN_CLS": ("AutoPeftModelForTokenClassification", "token-classification"),
    "QUESTION_ANS": ("AutoPeftModelForQuestionAnswering", "question-answering"),
    "FEATURE_EXTRACTION": ("AutoPeftModelForFeatureExtraction", "feature-extraction"),
}
"""PEFT's class and the Hub's task name for each task type."""

NOT_SHOWN = ("base_model_name_or_path", "inference_mode", "revision", "save_id")

TEXT = """---
{front_matter}
---

# {title}

A SMoA adapter ([arXiv:2605.21147](https://arxiv.org/abs/2605.21147)) of `{base}`: r = {r}, {blocks} blocks{by_layer}.

```python
import smoa  # registers SMoA with PEFT
from peft import {loader}

model = {loader}.from_pretrained("PATH")
```

{metrics}## Adapter

```json
{config}
```

The base model's license and terms of use apply.
"""


def adapter_card(title: str, config: Any, metrics: Mapping[str, float]) -> str:
    """Markdown with the front matter that model hubs read; `config` is the SmoaConfig as saved."""
    loader, pipeline = LOADERS.get(str(getattr(config.task_type, "value", config.task_type)), ("AutoPeftModel", None))
    base = config.base_model_name_or_path or "a model without a name"
    return TEXT.format(
        front_matter=_front_matter(config.base_model_name_or_path, pipeline),
        title=title,
        base=base,
        r=config.r,
        blocks=config.num_blocks,
        by_layer=" in layers for which its config gives no other number" if config.num_blocks_pattern else "",
        loader=loader,
        metrics=_table(metrics),
        config=settings_as_json(config),
    )


def settings_as_json(config: PeftConfig) -> str:
    """The config's values as JSON, without empty ones and those in `NOT_SHOWN`."""
    values: dict[str, Any] = config.to_dict()
    shown = {
        key: sorted(value) if isinstance(value, set) else getattr(value, "value", value)
        for key, value in values.items()
        if value not in (None, {}, [], False) and key not in NOT_SHOWN
    }
    return json.dumps(shown, indent=2, sort_keys=True)


def _front_matter(base: str | None, pipeline: str | None) -> str:
    """YAML for the Hub. A base model in a local folder is left out, because the Hub can't link to it."""
    named = base is not None and not base.startswith((".", "/", "~")) and ":" not in base and "\\" not in base
    known: dict[str, Any] = {"base_model": base} if named else {}
    tags = ["smoa", *([f"base_model:adapter:{base}"] if named else [])]
    return ModelCardData(**known, library_name="peft", pipeline_tag=pipeline, tags=tags).to_yaml()


def _table(metrics: Mapping[str, float]) -> str:
    if not metrics:
        return ""
    rows = "".join(f"| {name} | {value:.4g} |\n" for name, value in metrics.items())
    return f"## Results\n\n| metric | value |\n|---|---|\n{rows}\n"
