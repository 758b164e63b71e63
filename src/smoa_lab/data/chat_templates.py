"""Gives a tokenizer the chat template that a config names, and finds the one to train with."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smoa.errors import ConfigError
from smoa_lab.basics.values import nearest

SPECIAL = re.compile(r"<\|[a-z_]+\|>|<(?:start|end)_of_turn>|\[/?INST\]")
"""What looks like a special token in a template."""
GREETING = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]


def set_chat_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Give the tokenizer the template of that name, ``alpaca``, one of TRL's, or a ``.jinja`` file."""
    template = _template(name, tokenizer)
    unknown = sorted(set(SPECIAL.findall(template)) - tokenizer.get_vocab().keys())
    if unknown:
        lacking = f"the tokens {', '.join(unknown)}, which this model's vocabulary lacks"
        raise ConfigError(f"data.template: {name} has {lacking}; use alpaca, which needs none")
    tokenizer.chat_template = template


def training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template with marks around the assistant's turns: the tokenizer's own, or TRL's for it; None if neither is
    known."""
    from trl import chat_template_utils as utilities

    if utilities.has_generation_markers(tokenizer.chat_template):
        return str(tokenizer.get_chat_template())
    try:
        template: str | None = utilities.get_training_chat_template(tokenizer)
    except (ValueError, TypeError, TemplateError):  # not one that TRL knows
        return None
    return template


def stop_at_turns_end(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let ``generate`` stop at the token that ends a turn in the template, where that is a token of its own."""
    try:
        text = str(tokenizer.apply_chat_template(GREETING, tokenize=False)).rstrip()
    except (TemplateError, TypeError):  # it wants other turns, and no row may have them
        return
    last = tokenizer(text, add_special_tokens=False)["input_ids"][-1]
    config: Any = model.generation_config
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if last in tokenizer.get_added_vocab().values() and last not in known:
        config.eos_token_id = [*(token for token in known if token is not None), last]


def alpaca(tokenizer: PreTrainedTokenizerBase) -> str:
    """The format of Alpaca as a template of conversations, as the commonsense line of work has it (LLM-Adapters,
    arXiv:2304.01933), without the indentation that its code carries by accident.

    Later turns follow without its first line, whose place a system prompt takes. Answers close with the end token.
    """
    text = Path(__file__).with_name("alpaca.jinja").read_text(encoding="utf-8")
    return "{{ bos_token }}" * (tokenizer.bos_token_id in tokenizer("")["input_ids"]) + text  # GPT-2 has one, unused


def _template(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if name == "alpaca":
        return alpaca(tokenizer)
    if name.endswith((".jinja", ".j2")):
        return Path(name).expanduser().read_text(encoding="utf-8")
    folder = resources.files("trl") / "chat_templates"
    files = {file.name.removesuffix(".jinja") for file in folder.iterdir() if file.name.endswith(".jinja")}
    known = {file for file in files if not file.endswith("_training")}
    if name not in known:
        near = nearest(name, ["alpaca", *sorted(known)])
        raise ConfigError(f"data.template: there is no template {name!r}{near}; or name a .jinja file")
    trained = folder / f"{name}_training.jinja"
    return (trained if trained.is_file() else folder / f"{name}.jinja").read_text(encoding="utf-8")
