"""What held-out rows show before and after training: loss, perplexity, and the model's answers."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict
from functools import cached_property
from typing import Any

from smoa_lab.data.prompts import pad_token
from smoa_lab.lessons.lesson import Looks, Stage
from smoa_lab.rows.formats import Preference
from smoa_lab.rows.plain_examples import read_examples
from smoa_lab.scoring.generation import continue_prompts
from smoa_lab.scoring.row_losses import Losses, row_losses
from smoa_lab.tokens.encoding import RowEncoder, side

logger = logging.getLogger(__name__)

NEW_TOKENS = 128
"""The most tokens of a sample answer."""


class RowLooks(Looks):
    """Loss and perplexity on ``rows``, a data set, and the model's answers to the first ``samples`` of them, but for
    prompts beyond ``max_length``. Of preferences it is the loss of the chosen answers, and how many of them gained on
    the rejected ones."""

    def __init__(self, rows: Any, encoder: RowEncoder, max_length: int | None, samples: int) -> None:
        super().__init__()
        self.rows, self.encoder, self.max_length = rows, encoder, max_length
        self.pad = pad_token(encoder.tokenizer)
        found = (encoder.prompt(example, max_length) for example in read_examples(rows["example"][:samples]))
        self.prompts = [prompt for prompt in found if prompt is not None]
        self.losses: dict[str, Losses] = {}
        self.worse: dict[str, Losses] = {}

    def look(self, model: Any, stage: Stage) -> None:
        if not len(self.rows):
            return
        logger.info("Scoring %d held-out rows %s training", len(self.rows), stage)
        self.losses[stage] = self.measured(model)
        if self.rejected:
            self.worse[stage] = row_losses(model, self.rejected, self.pad)
        self.evaluation[stage] = {"all": _scores(self.losses[stage])}
        prompts = [ids for ids, _ in self.prompts]
        self.written[stage] = continue_prompts(model, self.encoder.tokenizer, prompts, NEW_TOKENS)

    def measured(self, model: Any) -> Losses:
        """The losses of a model on the rows."""
        return row_losses(model, self.rows.remove_columns("example").to_list(), self.pad)

    @property
    def gain(self) -> dict[str, float] | None:
        if len(self.losses) < 2:
            return None
        change = self.losses["after"].change_from(self.losses["before"])
        preferred = {"preferred": self._preferred()} if self.worse else {}
        return {"loss": change.mean, "loss_stderr": change.stderr, **preferred}

    def _preferred(self) -> float:
        """The share of preferences whose chosen answer gained on the rejected one: DPO's accuracy."""
        stages = [(self.losses[stage].nll, self.worse[stage].nll) for stage in ("before", "after")]
        before, after = ([low - high for high, low in zip(*pair, strict=True)] for pair in stages)
        return sum(late > early for early, late in zip(before, after, strict=True)) / len(before)

    @cached_property
    def rejected(self) -> list[dict[str, list[int]]]:
        """The rejected answers, where the rows are preferences."""
        pairs = read_examples(self.rows["example"])
        encoded = [self.encoder.encode(side(pair, "rejected")) for pair in pairs if isinstance(pair, Preference)]
        return [asdict(tokens.cut(self.max_length)) for tokens in encoded]

    @property
    def asked(self) -> list[tuple[str, str]]:
        decode = self.encoder.tokenizer.decode
        return [(str(decode(ids)), reference) for ids, reference in self.prompts]


def _scores(losses: Losses) -> dict[str, Any]:
    return {
        "rows": len(losses.nll),
        "tokens": sum(losses.tokens),
        "loss": losses.mean,
        "loss_stderr": losses.stderr,
        "perplexity": _perplexity(losses.mean),
    }


def _perplexity(loss: float) -> float:
    """Infinity where a float can't hold it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
