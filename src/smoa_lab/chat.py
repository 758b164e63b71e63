"""Talks to an adapted model, and to its base: ``smoa chat``."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import typer
from peft import PeftModel
from transformers import TextStreamer

from smoa import ConfigError, DataError
from smoa_lab.base_models import to_device
from smoa_lab.config.methods import base_lost
from smoa_lab.open_run import Opened
from smoa_lab.scoring.evaluation import greedily
from smoa_lab.scoring.losses import scoring

HELP = """/both   answer the last message twice, by the base model and by the adapter
/base   turn the adapter off, or on again
/reset  forget the conversation
/quit   end the chat, as Ctrl-D does"""
Turns = list[dict[str, str]]


class Chat:
    """A conversation with the model of a run, an adapter or a model. An adapter is talked to through the template that
    it was trained with. Temperature 0 is greedy."""

    def __init__(
        self, opened: Opened, max_new_tokens: int = 256, temperature: float = 0.0, system: str | None = None
    ) -> None:
        found = opened.model
        self.tokenizer, self.max_new_tokens, self.temperature = found.tokenizer, max_new_tokens, temperature
        if not self.tokenizer.chat_template:  # before the weights are read
            raise DataError(f"{found.section.name}: its tokenizer has no chat template; use --template alpaca")
        self.prompt: Turns = [{"role": "system", "content": system}] if system else []
        self.turns: Turns = []
        self.base_model = found.load()
        to_device(self.base_model)
        self.model: Any = self.base_model
        if found.adapter is not None:
            self.model = PeftModel.from_pretrained(self.base_model, str(found.adapter))
        self.has_adapter = self.uses_adapter = found.adapter is not None
        self.adapter_name = opened.name

    @property
    def name(self) -> str:
        """Who answers."""
        return self.adapter_name if self.uses_adapter else "base"

    def respond(self, line: str) -> None:
        """Answer a message, or run a command, which begins with a slash; ``/quit`` raises EOFError."""
        match line.strip():
            case "":
                pass
            case "/quit":
                raise EOFError
            case "/reset":
                self.turns = []
                typer.echo("The conversation starts anew.")
            case "/base":
                self._check_base()
                self.uses_adapter = not self.uses_adapter
                typer.echo(f"{self.name} answers.")
            case "/both":
                self._check_base()
                if not self.turns:
                    raise ConfigError("no message to answer yet")
                for uses_adapter in (False, True):
                    typer.echo(f"{self.adapter_name if uses_adapter else 'base'}:")
                    self._write(self.turns[:-1], uses_adapter)
            case command if command.startswith("/"):
                typer.echo(HELP)
            case message:
                asked = [*self.turns, {"role": "user", "content": message}]
                answer = self._write(asked, self.uses_adapter)
                self.turns = [*asked, {"role": "assistant", "content": answer}]

    def _check_base(self) -> None:
        """Raise ConfigError where switching the adapter off, if there is one, doesn't leave the base."""
        if not self.has_adapter:
            raise ConfigError("this is a model without an adapter; start again with the folder of an adapter or a run")
        if (lost := base_lost(self.model.active_peft_config)) is not None:
            raise ConfigError(f"the adapter {lost}; chat with the base by itself")

    def _write(self, turns: Turns, uses_adapter: bool) -> str:
        """Write and show the next message."""
        inputs: Any = self.tokenizer.apply_chat_template(
            [*self.prompt, *turns], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        inputs = inputs.to(self.base_model.device)
        adapter: Any = nullcontext() if uses_adapter or not self.has_adapter else self.model.disable_adapter()
        with scoring(self.model), adapter, greedily(self.model, self.tokenizer):
            written = self.model.generate(
                **inputs,
                max_new_tokens=self.max_new_tokens,
                streamer=TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
                **({"do_sample": True, "temperature": self.temperature} if self.temperature else {}),
            )
        return str(self.tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()
