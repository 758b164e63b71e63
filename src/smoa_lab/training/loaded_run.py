"""A run's rows and base model, loaded: all that it needs before its first step."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smoa.errors import ConfigError, DataError
from smoa_lab.base_models import RunModel, base_config, base_content, positions_of
from smoa_lab.config.run import RunConfig
from smoa_lab.data.encoding import Encoder
from smoa_lab.data.general_text import STORY, passages
from smoa_lab.data.prepared import PreparedRows, Reading, require_good_rows
from smoa_lab.data.row import PARTS
from smoa_lab.scoring.evaluation import Evaluation
from smoa_lab.training.run_folder import RunFolder


@dataclass(frozen=True)
class LoadedRun:
    """Model, rows, and the encoder that turns rows into tokens."""

    config: RunConfig
    model: RunModel
    base: PreTrainedModel
    encoder: Encoder
    data: PreparedRows

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.encoder.tokenizer

    @cached_property
    def digests(self) -> dict[str, str]:
        """What the run starts from, by content: rows, base model, and what turns rows into tokens."""
        return digests_of(self.config, self.encoder, self.data)

    def evaluation(self, answers: bool = True, folder: RunFolder | None = None) -> tuple[Evaluation, int | None]:
        """What will be measured on the held-out rows, and how many are left out because the run in ``folder`` was
        trained on them, None where it doesn't know. Without ``answers`` the model answers no samples."""
        section, part = self.config.data, self.config.scoring.part
        rows = self.data.rows(part)
        trained_on: int | None = 0
        if folder is not None and not section.recall:
            rows, trained_on = folder.not_trained_on(rows)
        told = section.metric, section.answer_tokens
        return Evaluation(self.encoder, rows, section.samples * answers, part, *told), trained_on


def load_run(config: RunConfig, trains: bool = True) -> LoadedRun:
    """Load rows and model; what cannot be loaded or, if it ``trains``, be trained fails here, before any work."""
    model = RunModel.of(config)
    encoder, data = trainable_rows_of(config, model.tokenizer, trains)
    return LoadedRun(config, model, model.load(), encoder, data)


def inputs(config: RunConfig) -> dict[str, Any]:
    """What a run would start from, without its weights: ``digests``, and how many ``rows`` each part has."""
    encoder, rows = trainable_rows_of(config, RunModel.of(config).tokenizer)
    numbers = {part: rows.account["parts"].get(part, 0) for part in PARTS}
    return {"digests": digests_of(config, encoder, rows), "rows": numbers}


def digests_of(config: RunConfig, encoder: Encoder, rows: PreparedRows) -> dict[str, str]:
    """Of the rows, of the base model, of what turns rows into tokens, and of a file as ``forgetting.text``."""
    of_encoder = sha256(json.dumps(encoder.state(), sort_keys=True, default=str).encode()).hexdigest()
    digests = {"data": rows.account["sha256"], "base": base_content(config.model), "encoder": of_encoder}
    if (text := config.forgetting.text) != STORY:
        digests["forgetting"] = sha256("\n".join(passages(text)).encode()).hexdigest()
    return digests


def read_rows_of(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[Encoder, PreparedRows]:
    """The rows of a run as tokens of :attr:`RunModel.tokenizer`; bad ones are counted."""
    section = config.data
    assistant, completion = (config.training.get(key) for key in ("assistant_only_loss", "completion_only_loss"))
    encoder = Encoder(tokenizer, section.max_length, assistant is not False, completion is not False)
    train, test = section.sources()
    how = section.group, section.recall, bool(section.test)
    return encoder, Reading(train, test, section.format, section.sizes, encoder, *how).prepare()


def trainable_rows_of(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, trains: bool = True
) -> tuple[Encoder, PreparedRows]:
    """What :func:`read_rows_of` gives, or an error where that can't be trained on, or has bad rows."""
    encoder, rows = read_rows_of(config, tokenizer)
    account = rows.account
    require_good_rows(account, config.data.skip_bad_rows)
    _check_positions(config, account)
    if not trains:
        return encoder, rows
    if metric := config.data.metric:
        Evaluation(encoder, rows.rows(config.scoring.part), metric=metric, answer_tokens=config.data.answer_tokens)
    if not account["parts"].get("train"):
        raise DataError(
            f"{config.data.source}: leaves no rows to train on: {account['also_held_out']} are held out too, "
            f"{account['dropped']} have nothing trained within {account['max_length']} tokens, "
            f"{account['parts'].get('test', 0)} are held out, {account['bad']} are bad"
        )
    return encoder, rows


def _check_positions(config: RunConfig, account: dict[str, Any]) -> None:
    """Raise ConfigError if rows are longer than what the model takes."""
    positions, longest = positions_of(base_config(config.model)), account["tokens"].get("longest", 0)
    cut_at = account["max_length"] or longest
    longest = cut_at if config.training.get("packing") else min(longest, cut_at)
    if positions is not None and longest > positions:
        found = f"rows of up to {longest:,} tokens would be given to this model, which has {positions:,} positions"
        raise ConfigError(f"data.max_length: {found}; set it to {positions}")
