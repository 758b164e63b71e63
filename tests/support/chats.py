"""A tiny model with a chat template, adapters of it, and a screen that keeps what a chat shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from smoa_lab.chat import ChatModel, GenerationSettings, Screen, find, load
from tests.support.adapted_models import adapted
from tests.support.lab import byte_tokenizer, tiny_base

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.content == 'forbidden' %}{{ raise_exception('no such prompt') }}{% endif %}"
    "{{ message.role[0] + ':' + message.content + ';' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
SETTINGS = GenerationSettings(max_new_tokens=12)


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


def chat_model_of(place: Path, settings: GenerationSettings = SETTINGS, **changes: Any) -> ChatModel:
    """The chat model that `smoa chat` makes of a place."""
    return load(find(str(place), changes), settings)


def written(model: Any, place: Path, messages: list[dict[str, str]], new_tokens: int = SETTINGS.max_new_tokens) -> str:
    """What transformers' own `generate` writes, greedily."""
    tokenizer: Any = AutoTokenizer.from_pretrained(place)
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    text: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


class KeptScreen(Screen):
    """Keeps pieces, answers and notes in lists."""

    def __init__(self) -> None:
        super().__init__(is_terminal=False)
        self.pieces: list[str] = []
        self.answers: list[str] = []
        self.notes: list[str] = []

    def write(self, piece: str) -> None:
        self.pieces.append(piece)

    def end(self) -> None:
        self.answers.append("".join(self.pieces))
        self.pieces = []

    def say(self, note: str) -> None:
        self.notes.append(note)
