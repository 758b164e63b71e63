"""Writes the README.md of a saved adapter: base model, how to load it, results, settings.

Cards name a base model by its Hub id, or a local one by its last name.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # it lists no exports
from peft import PeftConfig

import smoa
from smoa.config import SmoaConfig
from smoa_lab.pages.templates import render

NOT_SHOWN = ("base_model_name_or_path", "inference_mode", "revision")


def adapter_card(title: str, config: PeftConfig, base: NamedBase, sections: str) -> str:
    """Markdown with the front matter that model hubs read, for the ``config`` of an adapter as saved, of any method.
    ``sections`` stand before the settings."""
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
    return card_text(title, base, config, front_matter, intro, loading_code(config, base), sections, adapts=True)


def card_text(
    title: str,
    base: NamedBase,
    config: PeftConfig,
    front_matter: dict[str, Any],
    intro: str,
    loading: str,
    sections: str,
    adapts: bool = False,
) -> str:
    """The card of a model that ``adapts`` a base, or of a merged one: front matter, heading, introduction, how to load
    it, settings."""
    shown = {
        key: sorted(value) if isinstance(value, set) else getattr(value, "value", value)
        for key, value in config.to_dict().items()
        if value not in (None, {}, [], False) and key not in NOT_SHOWN
    }
    known: dict[str, Any] = {**front_matter} | ({"base_model": base.hub_id} if base.hub_id else {})
    return render(
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


@dataclass(frozen=True)
class NamedBase:
    """A base model in words, and its id on the Hub, to which a card's front matter links, or None; of one of the lab's
    packages the name by which the lab loads it, and the file that it was unpacked from."""

    text: str
    hub_id: str | None
    packaged: str | None = field(default=None, compare=False)
    file: str = field(default="", compare=False)


def named_base(source: str | None) -> NamedBase:
    """The name of a base that was loaded from `source`.

    Of a local folder or file only the last name: the rest is of this machine, and the Hub can't link to it.
    """
    if not source:
        return NamedBase("a model without a name", None)
    with suppress(HFValidationError):
        validate_repo_id(source)
        if not source.endswith(".gguf") and not Path(source).exists():
            return NamedBase(source, source)
    return NamedBase(PureWindowsPath(source).name, None)  # splits at / and \


def loading_code(config: PeftConfig, base: NamedBase) -> str:
    """Python that loads the adapter from "PATH". PEFT finds the base in the config, unless that names another place
    than the Hub's."""
    recorded = config.base_model_name_or_path
    return render("loading.py.jinja", base=base, is_ours=isinstance(config, SmoaConfig), recorded=recorded)


def method_name(config: PeftConfig) -> str:
    """PEFT's name of the adapter's method, in capitals."""
    return str(getattr(config.peft_type, "value", config.peft_type))
