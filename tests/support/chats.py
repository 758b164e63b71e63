"""A tiny model with a chat template, and adapters of it."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.support.adapted_models import adapted
from tests.support.lab import byte_tokenizer, tiny_base

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.content == 'forbidden' %}{{ raise_exception('no such prompt') }}{% endif %}"
    "{{ message.role[0] + ':' + message.content + ';' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
NEW_TOKENS = 12


def chat_base(folder: Path) -> Path:
    """The tiny base, with a chat template. It writes words of few letters, so that text can be streamed."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tiny_base(folder))
    letters = tokenizer("abcdefgh ", add_special_tokens=False)["input_ids"]
    others = sorted(set(range(len(tokenizer))) - set(letters))
    GenerationConfig(suppress_tokens=others, pad_token_id=0, eos_token_id=2).save_pretrained(folder)
    return folder


def saved_adapter(folder: Path, base: Path, seed: int = 1, **config: Any) -> Path:
    """An adapter of random factors that changes what the base writes."""
    torch.manual_seed(seed)
    adapted(AutoModelForCausalLM.from_pretrained(base), alpha=64, **config).save_pretrained(folder)
    return folder


def written(model: Any, place: Path, messages: list[dict[str, str]]) -> str:
    """What transformers' own `generate` writes, greedily."""
    tokenizer: Any = AutoTokenizer.from_pretrained(place)
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    text: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text
