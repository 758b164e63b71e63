"""Studies of adapters on the last layers of a language model: what reaches these is computed once and kept.

An ordinary model of these layers is trained, until its loss no longer falls, and scored.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from smoa.errors import ConfigError
from smoa_lab.base_models import load_base_model
from smoa_lab.config.run import ModelSection, RunConfig
from smoa_lab.data.encoding import IGNORED
from smoa_lab.data.rows import Row, content_hash
from smoa_lab.data.tasks import Selection
from smoa_lab.scoring.evaluation import Outcome
from smoa_lab.scoring.losses import scoring
from smoa_lab.study.comparison import Comparison
from smoa_lab.study.runner import Runner
from smoa_lab.study.study import Study
from smoa_lab.training.adapting import with_adapter
from smoa_lab.training.loaded_run import REPLACED, checked_arguments

LAYERS = 2
STOP = {"passes": 10, "fall": 0.01, "known": 0.02, "down": 10}
"""When the loss of a pass, in nats a token, has not fallen by the share ``fall`` in so many ``passes``, or is below
``known``, the learning rate falls to 0 over ``down`` more passes."""
BATCH = 256


@dataclass(frozen=True)
class Line:
    """What the last layers see of a row: ``hidden`` (tokens, width) comes in; ``answer`` (tokens) has what should come
    out at each place, as a number of a logit, or ``IGNORED``."""

    hidden: Tensor
    answer: Tensor


class LastLayers(Runner):
    """Trains and scores the last layers alone, of a model of Llama's kind, on questions that are made here. An answer
    ends with the end token."""

    task: str
    """What the questions are."""
    searched: str
    """The study whose search gives the learning rates of all sizes."""

    @cached_property
    def base(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The whole model and its tokenizer."""
        return load_base_model(ModelSection.model_validate(self.shared["model"]))

    @cached_property
    def vocabulary(self) -> list[int]:
        """The tokens that have a logit."""
        return list(range(self.base[0].config.vocab_size))

    @cached_property
    def head(self) -> Tensor:
        """The output layer's rows of these tokens."""
        with torch.inference_mode(False):  # scoring may ask first, and what is made there can't be trained with
            weight: Tensor = self.base[0].get_output_embeddings().weight.detach()
            return weight[self.vocabulary]

    def rows(self, count: int) -> dict[str, list[Row]]:
        """The questions of each part, about so many names."""
        raise NotImplementedError

    @cached_property
    def records(self) -> Selection:
        rows = self.rows(int(self.shared["data"]["train_examples"]))
        used = {part: {"examples": len(own), "sha256": content_hash(own)} for part, own in rows.items()}
        return Selection(**rows, families={self.task: "text"}, account={"tasks": {}, "used": used})

    def stored_config(self, config: RunConfig) -> dict[str, Any]:
        stored = super().stored_config(config)
        return {**stored, "data": {**stored["data"], "tasks": [self.task]}, "stop": STOP}

    @cached_property
    def _kept(self) -> dict[str, list[Line]]:
        return {}

    def lines(self, rows: Sequence[Row]) -> list[Line]:
        """The rows as the last layers see them; computed once."""
        key = content_hash(rows)
        if key not in self._kept:
            batches = (rows[start : start + BATCH] for start in range(0, len(rows), BATCH))
            self._kept[key] = [line for batch in batches for line in self._lines(batch)]
        return self._kept[key]

    def _lines(self, rows: Sequence[Row]) -> list[Line]:
        base, tokenizer = self.base
        numbers = {token: number for number, token in enumerate(self.vocabulary)}
        ids, answers = [], []
        for row in rows:
            prompt, answer = (
                tokenizer(text, add_special_tokens=False)["input_ids"] for text in (row.prompt, row.completion)
            )
            ids.append(torch.tensor([*prompt, *answer]))
            wanted = [numbers[token] for token in (*answer, tokenizer.eos_token_id)]
            answers.append(torch.tensor([IGNORED] * (len(prompt) - 1) + wanted))
        hidden = hidden_below(base, LAYERS, pad_sequence(ids, batch_first=True))
        return [Line(one[: len(answer)], answer) for one, answer in zip(hidden, answers, strict=True)]

    @property
    def training_set(self) -> Any:
        """The lines of a pass."""
        return self.lines(self.records.train)

    def _fit(self, config: RunConfig, checkpoint: str | None, check: TrainerCallback) -> tuple[Any, Any, float]:
        arguments = checked_arguments(TrainingArguments(**config.training))
        set_seed(arguments.seed)
        model = with_adapter(copy.deepcopy(top_of(self.base[0], LAYERS)), config.method, config.adapter)
        rows = self.training_set
        steps = math.ceil(len(rows) / arguments.per_device_train_batch_size)
        plateau = Plateau(int(arguments.warmup_steps), steps, int(arguments.num_train_epochs))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, arguments.learning_rate, weight_decay=0)
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=batch_of,
            compute_loss_func=lambda outputs, labels, **_: losses(outputs.logits, labels, self.head)[0].mean(),
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, plateau.factor)),
            callbacks=[check, plateau],
        )
        for callback in REPLACED:
            trainer.remove_callback(callback)
        started = time.process_time()  # these machines are shared
        trainer.train(resume_from_checkpoint=checkpoint)
        return model, trainer, time.process_time() - started

    def _outcomes(self, model: nn.Module | None, config: RunConfig, rows: Sequence[Row]) -> list[Outcome]:
        """As for any free answer, the loss is without that of the end token."""
        scored: Any = top_of(self.base[0], LAYERS) if model is None else model
        lines, outcomes = self.lines(rows), []
        with scoring(scored):
            for start in range(0, len(rows), BATCH):
                batch = batch_of(lines[start : start + BATCH])
                labels = batch.pop("labels")
                nll, right = losses(scored(**batch).logits, labels, self.head)
                lengths = (labels != IGNORED).sum(1).tolist()
                outcomes += [
                    Outcome(row, float(own[:-1].sum()), len(own) - 1, bool(hits.all()), bool(hits.all()))
                    for row, own, hits in zip(rows[start:], nll.split(lengths), right.split(lengths), strict=False)
                ]
        return outcomes


def batch_of(lines: Sequence[Line]) -> dict[str, Tensor]:
    """Lines of any length, filled up at their ends, which no earlier token sees."""
    hidden = pad_sequence([line.hidden for line in lines], batch_first=True)
    answers = pad_sequence([line.answer for line in lines], batch_first=True, padding_value=IGNORED)
    return {"inputs_embeds": hidden, "labels": answers}


def losses(hidden: Tensor, answers: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """The negative log-likelihood in nats of each token that is asked for, row after row, and whether it is the
    likeliest; ``hidden`` comes out of the last layer."""
    asked = answers != IGNORED
    logits, wanted = F.linear(hidden[asked], head).float(), answers[asked]
    return F.cross_entropy(logits, wanted, reduction="none"), logits.argmax(-1) == wanted


class Plateau(TrainerCallback):
    """The learning rate by ``STOP``: warm-up, constant while the loss falls, then down to 0, where training ends."""

    def __init__(self, warmup: int, steps: int, passes: int) -> None:
        """``steps`` are of a pass, and ``passes`` the most of all."""
        self.warmup, self.steps = warmup, steps
        self.last = passes * steps

    def factor(self, step: int) -> float:
        """Of the learning rate, at a step."""
        down = STOP["down"] * self.steps
        return max(0.0, min(1.0, (step + 1) / self.warmup, (self.last - step) / down))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Called by the Trainer, which logs the mean loss of each pass."""
        passes = [each["loss"] for each in state.log_history if "loss" in each]
        before = passes[: -int(STOP["passes"])]
        is_flat = bool(before) and min(passes) > (1 - STOP["fall"]) * min(before)
        if is_flat or min(passes) < STOP["known"]:
            self.last = min(self.last, state.global_step + int(STOP["down"]) * self.steps)
        control.should_training_stop |= state.global_step >= self.last


def top_of(base: Any, layers: int) -> Any:
    """The last layers of a model of Llama's kind as a model without an output layer: hidden states in
    (``inputs_embeds``) and out (``logits``). They share the base's weights."""
    config = copy.deepcopy(base.config)  # by from_dict it would lose the kind of attention
    config.update({"num_hidden_layers": layers, "tie_word_embeddings": False})
    config.update({"use_cache": False})  # the layers have their places in the base
    with torch.device("meta"):
        top = type(base)(config)
    top.model.layers, top.model.norm = base.model.layers[-layers:], base.model.norm
    top.model.rotary_emb = base.model.rotary_emb
    top.model.embed_tokens = nn.Embedding(1, config.hidden_size)  # not asked, and not to be on the meta device
    top.lm_head = nn.Identity()
    return top


@torch.no_grad()
def hidden_below(base: PreTrainedModel, layers: int, tokens: Tensor) -> Tensor:
    """What reaches the last layers: (rows, tokens, width)."""
    hidden: Tensor = base(input_ids=tokens, output_hidden_states=True, logits_to_keep=1).hidden_states[-layers - 1]
    return hidden


def passes_of(run: dict[str, Any]) -> float:
    """The passes that a stored run took; it has a question for each entry of a pass."""
    entries, batch = run["scores"]["all"]["questions"], run["config"]["training"]["per_device_train_batch_size"]
    return float(run["steps"] / math.ceil(entries / batch))


def of_size(count: int) -> list[str]:
    """The changes to a study's file for so many entries."""
    return [f"shared.data.{part}_examples={count}" for part in ("train", "validation", "test")]


def at_searched_rates(study: Study, searched: Comparison) -> Study:
    """The study without a search: the entries whose search is over in another study, at the rates found there.

    Raises:
        ConfigError: there is none.
    """
    done = [name for name in study.entries if searched.stored_search(name) and not searched.search(name)]
    if not done:
        raise ConfigError(f"{study.folder.name}: no learning rate is known; run {searched.study.folder.name} first")
    rates = {name: searched.tuned(name).learning_rate for name in done}
    entries = {name: study.entries[name].model_copy(update={"learning_rate": rates[name]}) for name in done}
    references = [name for name in study.references if name in entries]
    tuning = study.tuning.model_copy(update={"max_runs": 0})
    return study.model_copy(update={"entries": entries, "references": references, "tuning": tuning})
