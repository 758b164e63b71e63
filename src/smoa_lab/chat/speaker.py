"""A model that answers, with its adapters by name: which of them is used, and whether any is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from smoa import cached_weights
from smoa.errors import DataError, SmoaError
from smoa_lab.basics.free_name import free_name
from smoa_lab.basics.nearest import nearest
from smoa_lab.basics.positions import positions_of
from smoa_lab.data.chat_templates import alpaca, saved_chat_template, stop_at_turns_end
from smoa_lab.data.questions import Template
from smoa_lab.models.packaged_models import packaged_name
from smoa_lab.runs.open_run import adapter_of_run, base_name, trained_template
from smoa_lab.scoring.losses import scoring

Message = dict[str, str]
"""``role`` and ``content``."""


@dataclass(frozen=True)
class Writing:
    """How answers are written; temperature 0 is greedy."""

    max_new_tokens: int = 256
    temperature: float = 0.0


class Speaker:
    """A base model and the adapters loaded on it. ``bases`` are the names by which adapters may call the base.

    An adapter is talked to through the template that it was trained with, or all through ``template``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        writing: Writing,
        bases: Sequence[str],
        template: Template | None = None,
    ) -> None:
        self.base = model
        self.model: Any = model  # with its adapters, once there are any
        self.tokenizer: Any = tokenizer
        self.writing = writing
        self.bases = {_canonical(name) for name in bases}
        self.template = template
        self.own_template, self.own_ends = tokenizer.chat_template, model.generation_config.eos_token_id
        self.templates: dict[str, str] = {}
        self.adapters: dict[str, str] = {}  # PEFT's name of each: ours can be words that PEFT refuses
        self.chosen: str | None = None
        self.uses_adapter = False

    @property
    def name(self) -> str:
        """The adapter that answers, or ``base``."""
        return self.chosen if self.chosen is not None and self.uses_adapter else "base"

    def toggle(self) -> None:
        """Turn the adapter off, or on again."""
        self.require_adapter()
        self.uses_adapter = not self.uses_adapter

    def require_adapter(self) -> None:
        """Raise DataError if no adapter is loaded."""
        if self.chosen is None:
            raise DataError("no adapter is loaded; /load one")

    def use(self, name: str) -> None:
        """Answer with this loaded adapter."""
        if name not in self.adapters:
            raise DataError(f"no adapter {name!r} is loaded{nearest(name, self.adapters)}")
        self.model.set_adapter(self.adapters[name])
        self.talk_through(self.templates[name])
        self.chosen, self.uses_adapter = name, True

    def talk_through(self, template: str) -> None:
        """Put messages through this chat template from now on, and stop where it ends a turn."""
        self.tokenizer.chat_template = template
        self.base.generation_config.eos_token_id = self.own_ends
        stop_at_turns_end(self.base, self.tokenizer)

    def load(self, place: str, base: str | None = None, template: Template | None = None) -> None:
        """Load the adapter of a folder or of a run, and use it; ``base`` if it is known to be one of this model, and
        ``template`` if it is known.

        Raises:
            SmoaError: there is none, or it does not fit. The model is as before.
        """
        path = Path(place).expanduser()
        folder = adapter_of_run(path)
        own = base_name(folder, base)
        if _canonical(own) not in self.bases:
            raise DataError(
                f"{place}: is an adapter of {own}, this model is {', '.join(sorted(self.bases))}; "
                "if they are the same, start again with --base"
            )
        template = template or self.template or trained_template(path)
        through = chat_template(self.tokenizer, self.own_template, folder, template)
        name = free_name(_run_name(folder.resolve()), self.adapters.__contains__)
        inner = f"chat{len(self.adapters)}"
        try:
            self._add(folder, inner)
        except SmoaError:
            self._remove(inner)
            raise
        except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:  # PEFT's, of other methods
            self._remove(inner)
            raise DataError(f"{place}: cannot be loaded: {error}") from error
        self.adapters[name], self.templates[name] = inner, through
        self.use(name)

    def _add(self, folder: Path, inner: str) -> None:
        if isinstance(self.model, PeftModel):
            self.model.load_adapter(str(folder), inner)
        else:
            self.model = PeftModel.from_pretrained(self.model, str(folder), inner)

    def _remove(self, inner: str) -> None:
        """Remove what a failed load left."""
        if isinstance(self.model, PeftModel):
            if inner in self.model.peft_config:
                self.model.delete_adapter(inner)
            return
        for name, layer in list(self.base.named_modules()):
            if isinstance(layer, BaseTunerLayer):
                self.base.set_submodule(name, layer.get_base_layer())
            elif isinstance(layer, AuxiliaryTrainingWrapper):
                self.base.set_submodule(name, layer.original_module)
        vars(self.base).pop("peft_config", None)

    def tokens(self, messages: Sequence[Message]) -> Any:
        """The model's inputs for its next message.

        Raises:
            DataError: the chat template refuses the messages, for example a system prompt.
        """
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except TemplateError as error:
            raise DataError(f"the model's chat template refuses this: {error}") from error

    def excess(self, messages: Sequence[Message]) -> int:
        """The number of tokens by which the messages and the longest answer exceed the model's positions."""
        positions = positions_of(self.base.config)
        wanted = self.tokens(messages)["input_ids"].shape[1] + self.writing.max_new_tokens
        return 0 if positions is None else max(0, wanted - positions)

    def write(self, messages: Sequence[Message], show: Callable[[str], None], adapted: bool | None = None) -> None:
        """Write the next message and show it piece by piece, with the adapter or without, by default as it is set."""
        with ExitStack() as stack:
            stack.enter_context(scoring(self.model))
            if self.uses_adapter if adapted is None else adapted:
                stack.enter_context(cached_weights(self.model))  # anew: an adapter may have added layers
            elif self.chosen is not None:
                stack.enter_context(self.model.disable_adapter())
            inputs = self.tokens(messages).to(self.base.device)
            self.model.generate(**inputs, **self._options(), streamer=_Pieces(self.tokenizer, show))

    def _options(self) -> dict[str, Any]:
        known = self.base.generation_config.eos_token_id
        ends = {*(known if isinstance(known, list) else [known]), self.tokenizer.eos_token_id} - {None}
        options = {
            "max_new_tokens": self.writing.max_new_tokens,
            "pad_token_id": self.tokenizer.pad_token_id,
            "eos_token_id": sorted(ends) or None,
        }
        if self.writing.temperature:
            return {**options, "do_sample": True, "temperature": self.writing.temperature}
        return {**options, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def chat_template(tokenizer: Any, own: Any, adapter: Path | None, template: Template) -> str:
    """The chat template of an adapter or, where none is saved with it, its base's ``own``.

    Raises:
        DataError: neither has one.
    """
    if template == "alpaca":
        return alpaca(tokenizer)
    saved = None if adapter is None else saved_chat_template(adapter)
    found = saved or own
    if not found:
        raise DataError(f"{tokenizer.name_or_path}: its tokenizer has no chat template; use --template alpaca")
    return str(found)


def _canonical(base: str) -> str:
    """One name for a packaged model and its folder, and one for a folder with ``~`` and without."""
    place = str(Path(base).expanduser())
    return packaged_name(place) or place


class _Pieces(TextStreamer):
    """Passes the text on instead of printing it."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text or stream_end:
            self.show(text)


def _run_name(folder: Path) -> str:
    """The name of the run, whose adapter lies in a folder ``adapter``."""
    return folder.parent.name if folder.name == "adapter" else folder.name
