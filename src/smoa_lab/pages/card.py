"""Writes the README.md of a saved adapter or a merged model: base, how to load it, results, settings.

Cards name a base model by its Hub id, or a local one by its last name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # it lists no exports
from jinja2 import StrictUndefined, Template
from peft import PeftConfig

import smoa
from smoa import SmoaConfig
from smoa_lab.config.yaml_text import to_yaml
from smoa_lab.pages.tables import metric_table, spread, steps_text

NOT_SHOWN = ("base_model_name_or_path", "inference_mode", "revision")
ANSWERS = {"reference": "Reference", "before": "Before", "after": "After"}
"""What a sample's answers are called."""


@dataclass(frozen=True)
class NamedBase:
    """A base model in words, and its id on the Hub, to which a card's front matter links, or None; of one of the lab's
    packages the name by which the lab loads it, and the file that it was unpacked from."""

    text: str
    hub_id: str | None
    packaged: str | None = field(default=None, compare=False)
    file: str = field(default="", compare=False)


def named_base(source: str) -> NamedBase:
    """The name of a base that was loaded from `source`.

    Of a local folder or file only the last name: the rest is of this machine, and the Hub can't link to it.
    """
    with suppress(HFValidationError):
        validate_repo_id(source)
        if not source.endswith(".gguf") and not Path(source).exists():
            return NamedBase(source, source)
    return NamedBase(PureWindowsPath(source).name, None)  # splits at / and \


def run_card(title: str, config: PeftConfig, base: NamedBase, metrics: Mapping[str, Any]) -> str:
    """The card of a run's adapter. ``config`` is the adapter's as saved, ``metrics`` the run's."""
    evaluation = metrics["evaluation"]
    sections = _render(
        "run_card.md.jinja",
        metrics=metrics,
        spread=spread,
        stages=list(evaluation),
        results=metric_table(evaluation),
        steps=steps_text(metrics["training"]),
        samples=samples_text(metrics["samples"][:2], level=3),
        config=to_yaml({key: value for key, value in metrics["config"].items() if key != "adapter"}),
    )
    return adapter_card(title, config, base, sections)


def adapter_card(title: str, config: PeftConfig, base: NamedBase, sections: str) -> str:
    """The card of an adapter of any method, with ``sections`` before its settings."""
    intro = f"A {method_name(config)} adapter of `{base.text}`, for PEFT."
    if isinstance(config, SmoaConfig):
        by_layer = " in layers for which its config gives no other number" if config.num_blocks_pattern else ""
        paper = "[arXiv:2605.21147](https://arxiv.org/abs/2605.21147)"
        intro = (
            f"A SMoA adapter ({paper}) of `{base.text}`: r = {config.r}, {config.num_blocks} blocks{by_layer}. "
            f"It needs smoa {smoa.__version__} or newer beside PEFT, by `pip install .` in a clone of smoa, and its "
            "import: without it PEFT fails with `KeyError: 'SMOA'`."
        )
    tags = [method_name(config).lower(), *([f"base_model:adapter:{base.hub_id}"] if base.hub_id else [])]
    front_matter = {"library_name": "peft", "pipeline_tag": "text-generation", "tags": tags}
    recorded = config.base_model_name_or_path  # PEFT loads that one by itself
    loading = _render("loading.py.jinja", base=base, is_ours=isinstance(config, SmoaConfig), recorded=recorded)
    return card_text(title, base, config, front_matter, intro, loading, sections, adapts=True)


def card_text(
    title: str,
    base: NamedBase,
    config: PeftConfig,
    front_matter: Mapping[str, Any],
    intro: str,
    loading: str,
    sections: str,
    adapts: bool = False,
) -> str:
    """The card of a model that ``adapts`` a base, or of a merged one, as Markdown with the front matter that model hubs
    read."""
    shown = {
        key: sorted(value) if isinstance(value, set) else getattr(value, "value", value)
        for key, value in config.to_dict().items()
        if value not in (None, {}, [], False) and key not in NOT_SHOWN
    }
    known: dict[str, Any] = {**front_matter} | ({"base_model": base.hub_id} if base.hub_id else {})
    return _render(
        "card.md.jinja",
        base=base,
        adapts=adapts,
        front_matter=ModelCardData(**known).to_yaml(),
        title=title,
        intro=intro,
        loading=loading,
        sections=sections,
        config=json.dumps(shown, indent=2, sort_keys=True),
    )


def samples_text(samples: Sequence[Mapping[str, str]], level: int = 2) -> str:
    """Each prompt with its answers below it, as Markdown under headings of the level."""
    texts = []
    for number, sample in enumerate(samples, start=1):
        answers = (f"{title}:\n\n{_block(sample[name])}" for name, title in ANSWERS.items() if name in sample)
        texts.append(f"{'#' * level} Prompt {number}\n\n{_block(sample['question'])}" + "".join(answers))
    return "".join(texts)


def _block(text: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))  # longer than any in the text
    return f"{fence}text\n{text.strip() or '(nothing)'}\n{fence}\n\n"


def method_name(config: PeftConfig) -> str:
    """PEFT's name of the adapter's method, in capitals."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def _render(template: str, **values: Any) -> str:
    """A template of this folder as Markdown, in which nothing is escaped."""
    text = Path(__file__).with_name(template).read_text(encoding="utf-8")
    rules: dict[str, Any] = {"undefined": StrictUndefined, "keep_trailing_newline": True}
    return str(Template(text, trim_blocks=True, lstrip_blocks=True, **rules).render(values))
