"""Writes the README.md of a merged model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from peft import PeftConfig

from smoa.export.streaming import RoundingLoss
from smoa.files.card import NamedBase, method_name, settings_as_json

TEXT = """---
{front_matter}
---

# {title}

`{base}` with the {method} adapter below merged into {layers} of its weights by smoa. It is a plain transformers model:
nothing else is needed to load it.

```python
{loading}
```

## Precision

Merged in float32, saved in {dtype}: {lost}
{notes}
## Adapter

```json
{config}
```

The base model's license and terms of use apply.
"""


def model_card(
    title: str, base: NamedBase, loading: str, config: PeftConfig, loss: RoundingLoss, notes: tuple[str, ...]
) -> str:
    """The card as Markdown, with the front matter that model hubs read. `loading` is the code that loads the model."""
    return TEXT.format(
        front_matter=_front_matter(base.hub_id),
        title=title,
        base=base.text,
        method=method_name(config),
        layers=len(loss.by_layer),
        loading=loading,
        dtype=str(loss.dtype).removeprefix("torch."),
        lost=loss_in_words(loss),
        notes="".join(f"\n{note}\n" for note in notes),
        config=settings_as_json(config),
    )


def loading_code(class_name: str, folder: Path) -> str:
    """Python code that loads the model of this class, and the processor or the tokenizer that `folder` has, if any."""
    found = {"model": class_name}
    if any(folder.glob("*processor_config.json")):
        found["processor"] = "AutoProcessor"
    elif any(folder.glob("tokenizer*")):
        found["tokenizer"] = "AutoTokenizer"
    lines = (f'{name} = {auto}.from_pretrained("PATH")' for name, auto in found.items())
    return "\n".join([f"from transformers import {', '.join(found.values())}", "", *lines])


def loss_in_words(loss: RoundingLoss) -> str:
    """One sentence on how much rounding changed the update, over all layers and in the worst one."""
    if loss.total == 0:
        return "rounding took nothing from the adapter's update."
    worst = max(loss.by_layer, key=loss.by_layer.__getitem__)
    return (
        f"rounding took {_percent(loss.total)} of the adapter's update "
        f"(‖error‖ / ‖ΔW‖; the most in {worst}: {_percent(loss.by_layer[worst])})."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def _front_matter(base: str | None) -> str:
    """YAML for the hub; `base` is an id on it, or None."""
    known: dict[str, Any] = {"base_model": base} if base else {}
    return ModelCardData(**known, library_name="transformers", tags=["smoa", "merged"]).to_yaml()
