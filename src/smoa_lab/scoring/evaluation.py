"""What a model shows before and after training: on held-out rows loss, perplexity, accuracy and sample answers, and on
general text the loss, whose rise is what the training forgot."""

from __future__ import annotations

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from smoa_lab.basics.positions import positions_of
from smoa_lab.data.encoding import Encoder, Tokens, pad_token
from smoa_lab.data.general_text import describe, passages
from smoa_lab.data.rows import Row, candidates, instruction
from smoa_lab.scoring.generation import continue_prompts
from smoa_lab.scoring.losses import Losses, Score, proportion, row_losses, score

logger = logging.getLogger(__name__)

Stage = Literal["before", "after"]
NEW_TOKENS = 128
"""The most tokens of a sample answer, and of one to a question."""
QUESTION_TOKENS = 24


@dataclass(frozen=True)
class Outcome:
    """One question: its gold answer's negative log-likelihood in nats over its tokens, and whether the answer is right,
    by likelihood and by likelihood per character."""

    row: Row
    gold_nll: float
    gold_tokens: int
    right: bool
    right_norm: bool


@dataclass(frozen=True)
class Scores:
    """``gold_loss``: mean negative log-likelihood of a gold answer's token, end token not counted, in nats.

    With choices, ``accuracy`` takes the choice of the highest log-likelihood, ``accuracy_norm`` that of the highest
    per character of its text (lm-eval's acc and acc_norm), ``majority`` always the commonest label. Without,
    ``accuracy`` is the exact match of greedy decoding: answer and end token are the likeliest at every place.
    """

    questions: int
    gold_loss: float
    gold_loss_stderr: float
    accuracy: float
    accuracy_stderr: float
    accuracy_norm: float | None = None
    accuracy_norm_stderr: float | None = None
    majority: float | None = None
    perplexity: float | None = None


def answer_outcomes(model: Any, encoder: Encoder, rows: Sequence[Row], batch_tokens: int = 4096) -> list[Outcome]:
    """What the model makes of each question, in order."""
    encoded = [encoder.choices(row) if row.choices else [encoder.encode(row)] for row in rows]
    scores = iter(score(model, [tokens for some in encoded for tokens in some], encoder.pad, batch_tokens))
    return [
        _of_choices(row, [next(scores) for _ in some], [len(text) for text in candidates(row, encoder.style)])
        if row.choices
        else _of_free_answer(row, next(scores), some[0])
        for row, some in zip(rows, encoded, strict=True)
    ]


def _of_free_answer(row: Row, scored: Score, tokens: Tokens) -> Outcome:
    """Its loss is without that of the end token, which a cut answer has lost: then it can't be right either."""
    nll = scored.nll if tokens.answer_cut else scored.nll[:-1]
    right = scored.greedy and not tokens.answer_cut
    return Outcome(row, sum(nll), len(nll), right, right)


def _of_choices(row: Row, scores: list[Score], lengths: list[int]) -> Outcome:
    assert row.label is not None
    losses = [choice.loss for choice in scores]
    normed = [loss / length for loss, length in zip(losses, lengths, strict=True)]
    return Outcome(
        row,
        gold_nll=losses[row.label],
        gold_tokens=len(scores[row.label].nll),
        right=losses.index(min(losses)) == row.label,
        right_norm=normed.index(min(normed)) == row.label,
    )


def score_outcomes(outcomes: Sequence[Outcome]) -> dict[str, Scores]:
    """Scores per task, and over all under ``all``."""
    names = dict.fromkeys(outcome.row.task for outcome in outcomes)
    per_task = {name: _scores([outcome for outcome in outcomes if outcome.row.task == name]) for name in names}
    return {**per_task, "all": _scores(outcomes)}


def _scores(outcomes: Sequence[Outcome]) -> Scores:
    gold = Losses([outcome.gold_nll for outcome in outcomes], [outcome.gold_tokens for outcome in outcomes])
    right = proportion([outcome.right for outcome in outcomes])
    scores = Scores(len(outcomes), gold.mean, gold.stderr, *right, perplexity=gold.perplexity)
    if not all(outcome.row.choices for outcome in outcomes):
        return scores
    norm, error = proportion([outcome.right_norm for outcome in outcomes])
    counts: dict[str, Counter[int | None]] = defaultdict(Counter)
    for outcome in outcomes:
        counts[outcome.row.task][outcome.row.label] += 1
    majority = sum(max(labels.values()) for labels in counts.values()) / len(outcomes)
    return replace(scores, accuracy_norm=norm, accuracy_norm_stderr=error, majority=majority)


class Evaluation:
    """Measures a model on held-out ``rows`` before and after training, and lets it answer the first ``samples``.

    ``evaluation`` has the scores of each stage: of questions those of :class:`Scores` by task, of other rows loss and
    perplexity, of preferences those of the better completions. Without ``baseline`` questions are scored after training
    only.
    """

    def __init__(
        self,
        encoder: Encoder,
        rows: Sequence[Row],
        samples: int = 0,
        batch_tokens: int = 4096,
        baseline: bool = True,
    ) -> None:
        self.encoder, self.rows, self.batch_tokens, self.baseline = encoder, rows, batch_tokens, baseline
        self.are_questions = bool(rows) and bool(rows[0].task)
        longest = None if self.are_questions else encoder.max_length
        prompts = ((row, encoder.prompt(row, longest)) for row in rows[:samples])
        self.prompts = [(row, *prompt) for row, prompt in prompts if prompt is not None]
        self.evaluation: dict[str, dict[str, Any]] = {}
        self.written: dict[str, list[str]] = {}
        self.outcomes: dict[str, list[Outcome]] = {}
        self.losses: dict[str, Losses] = {}
        self.rejected_losses: dict[str, Losses] = {}

    def measure(self, model: Any, stage: Stage) -> None:
        """Score the held-out rows, if there are any, and let the model answer."""
        if not self.rows or (stage == "before" and self.are_questions and not self.baseline):
            return
        what = "questions" if self.are_questions else "rows"
        logger.info("Scoring %d held-out %s", len(self.rows), what)
        if self.are_questions:
            self.outcomes[stage] = answer_outcomes(model, self.encoder, self.rows, self.batch_tokens)
            by_task = score_outcomes(self.outcomes[stage])
            self.evaluation[stage] = {name: asdict(scores) for name, scores in by_task.items()}
        else:
            self.losses[stage] = self.measured(model)
            if self.rejected:
                self.rejected_losses[stage] = row_losses(model, self.rejected, self.encoder.pad)
            losses = self.losses[stage]
            scores = {"rows": len(losses.nll), "tokens": sum(losses.tokens), "loss": losses.mean}
            self.evaluation[stage] = {"all": scores | {"loss_stderr": losses.stderr, "perplexity": losses.perplexity}}
        prompts = [ids for _, ids, _ in self.prompts]
        if prompts:
            logger.info("Writing %d sample answers", len(prompts))
        new_tokens = QUESTION_TOKENS if self.are_questions else NEW_TOKENS
        texts = continue_prompts(model, self.encoder.tokenizer, prompts, new_tokens)
        self.written[stage] = [" ".join(text.split()) for text in texts] if self.are_questions else texts

    def measured(self, model: Any) -> Losses:
        """The losses of a model on the rows; of questions those of the gold answers."""
        if self.are_questions:
            gold = [self.encoder.gold(row) for row in self.rows]
            scores = score(model, gold, self.encoder.pad, self.batch_tokens)
            return Losses([row.loss for row in scores], [len(row.nll) for row in scores])
        return row_losses(model, [self.encoder.encode(row) for row in self.rows], self.encoder.pad)

    @property
    def gain(self) -> dict[str, float] | None:
        """What changed, with its standard error, paired by question or row; None unless both stages were scored.

        ``preferred`` is the share of preferences whose better completion gained on the other: DPO's accuracy.
        """
        if len(self.outcomes) == 2:
            pairs = zip(self.outcomes["before"], self.outcomes["after"], strict=True)
            rises = [after.right - before.right for before, after in pairs]
            mean = sum(rises) / len(rises)
            squares = sum((rise - mean) ** 2 for rise in rises)
            return {"accuracy": mean, "accuracy_stderr": math.sqrt(squares / max(1, len(rises) - 1) / len(rises))}
        if len(self.losses) < 2:
            return None
        change = self.losses["after"].change_from(self.losses["before"])
        gain = {"loss": change.mean, "loss_stderr": change.stderr}
        if self.rejected_losses:
            early, late = (
                [bad - good for good, bad in zip(self.losses[stage].nll, self.rejected_losses[stage].nll, strict=True)]
                for stage in ("before", "after")
            )
            gain["preferred"] = sum(after > before for before, after in zip(early, late, strict=True)) / len(early)
        return gain

    @cached_property
    def rejected(self) -> list[Tokens]:
        """The rejected completions, where the rows are preferences."""
        return [self.encoder.encode(row, rejected=True) for row in self.rows if row.rejected is not None]

    @property
    def samples(self) -> list[dict[str, str]]:
        """Question, reference answer, and what was written at each stage: as ``metrics.json`` has them."""
        style, decode = self.encoder.style, self.encoder.tokenizer.decode
        return [
            {
                "question": instruction(row, style) if row.task else str(decode(ids)),
                "reference": reference,
                **{stage: texts[number] for stage, texts in self.written.items()},
            }
            for number, (row, ids, reference) in enumerate(self.prompts)
        ]


TEXT_TOKENS = 256
"""A longer text is cut at its end, and a shorter one where the model takes less."""


class Forgetting:
    """Measures a model of the config ``base`` on ``text`` before and after training, on at least so many ``tokens``.

    The text is read at once: a mistake in the run's config shows before any work.
    """

    def __init__(self, text: str, tokens: int, tokenizer: PreTrainedTokenizerBase, base: PretrainedConfig) -> None:
        self.source, self.tokenizer = text, tokenizer
        self.texts = at_least(tokenizer, passages(text), tokens, text_length(base)) if tokens else []
        self.losses: dict[str, Losses] = {}

    def measure(self, model: Any, stage: str) -> None:
        """Measure the loss ``before`` or ``after``."""
        if self.texts:
            logger.info("Scoring %d passages of general text", len(self.texts))
            self.losses[stage] = text_losses(model, self.tokenizer, self.texts)

    @property
    def metrics(self) -> dict[str, Any] | None:
        """What ``metrics.json`` has of it: the losses in nats per token, and their change with its standard error,
        paired by text; None if it was not measured."""
        if len(self.losses) < 2:
            return None
        before, after = self.losses["before"], self.losses["after"]
        change = after.change_from(before)
        return {
            "text": describe(self.source),
            "passages": len(self.texts),
            "tokens": sum(before.tokens),
            "before": before.mean,
            "after": after.mean,
            "change": change.mean,
            "stderr": change.stderr,
        }


def text_length(config: PretrainedConfig) -> int:
    """The most tokens of a text that this model is given."""
    return min(TEXT_TOKENS, positions_of(config) or TEXT_TOKENS)


def text_losses(model: Any, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Losses:
    """The losses of plain texts, over all their tokens; a model without a BOS token is given the first one.

    Dropout is off and no gradient is kept; the model's mode is restored.
    """
    length = text_length(model.config)
    rows = [Tokens(ids, ids) for ids in (_ids(tokenizer, text, length) for text in texts)]
    return row_losses(model, rows, pad_token(tokenizer))


def at_least(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], tokens: int, length: int) -> list[str]:
    """The first texts that, cut at ``length``, together have so many tokens; all of them if they have fewer."""
    chosen: list[str] = []
    for text in texts:
        if tokens <= 0:
            break
        chosen.append(text)
        tokens -= len(_ids(tokenizer, text, length))
    return chosen


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> list[int]:
    return list(tokenizer(text)["input_ids"])[:length]
