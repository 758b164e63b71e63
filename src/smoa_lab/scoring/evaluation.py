"""What a model shows before and after training: on held-out rows loss, accuracy and answers, and on general text the
loss, whose rise is what the training forgot."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from smoa.errors import DataError
from smoa_lab.base_models import positions_of
from smoa_lab.data.answers import ANSWERED, OWN, RULES, MetricName, own_metric
from smoa_lab.data.encoding import Encoder, Tokens, pad_token, text_ids
from smoa_lab.data.formats import shown
from smoa_lab.data.general_text import STORY, TITLE, passages
from smoa_lab.data.row import Row
from smoa_lab.scoring.losses import Losses, left_padded, progress, row_losses, score, scoring

logger = logging.getLogger(__name__)

Stage = Literal["before", "after"]
NEW_TOKENS, CHOICE_TOKENS = 128, 24
"""The most tokens of a sample answer, and of an answer to a row with choices."""
LEAST_TOKENS, ROOM = 32, 1.25
"""A scored answer may have ROOM times as many tokens as the 99th percentile of the references, LEAST_TOKENS at
least."""
BATCH_TOKENS = 4096
"""Padded tokens of a batch of choices, or of answers."""
TEXT_TOKENS = 256
"""General text is cut after so many tokens, or earlier where the model has fewer positions."""


@dataclass(frozen=True)
class Measured:
    """A model's scores of rows, in their order: the negative log-likelihood of each completion and, of rows with
    choices, whether the right choice is the likeliest. The completion of such a row is the right choice without its end
    token."""

    losses: Losses
    right: Sequence[bool] = ()


class Evaluation:
    """Measures a model before and after training on held-out ``rows``, which are a ``part`` of all. The model answers
    the first ``samples`` rows, or every row where the ``metric`` scores answers, in at most ``answer_tokens`` each."""

    def __init__(
        self,
        encoder: Encoder,
        rows: Sequence[Row],
        samples: int = 0,
        part: str = "test",
        metric: MetricName | None = None,
        answer_tokens: int | None = None,
    ) -> None:
        self.encoder, self.rows, self.part = encoder, rows, part
        self.chooses = bool(rows) and bool(rows[0].choices)
        self.choices = [encoder.choices(row) for row in rows] if self.chooses else []
        self.tokens = [] if self.chooses else [encoder.encode(row) for row in rows]
        self.metric, self.samples_shown = metric if metric in ANSWERED else None, samples
        prompts = (encoder.prompt(row, encoder.max_length) for row in rows[:samples])
        self.prompts = [prompt for prompt in prompts if prompt is not None]
        self.new_tokens = CHOICE_TOKENS if self.chooses else NEW_TOKENS
        if metric is not None and rows:
            self._check_metric(metric)
        if self.metric is not None and rows:
            self._answer_all(answer_tokens)
        self.measured: dict[Stage, Measured] = {}
        self.written: dict[Stage, list[str]] = {}
        self.scored: dict[Stage, list[float]] = {}

    def _check_metric(self, metric: MetricName) -> None:
        """Raise DataError where rows lack what the metric scores."""
        has_prompts = bool(self.rows[0].prompt) or not self.rows[0].is_text
        if not (self.chooses if metric == "choice" else has_prompts):
            needs = "one of several choices" if metric == "choice" else "the answer to a prompt"
            raise DataError(f"data.metric: {metric} scores {needs}, and these rows have none; leave it out")

    def _answer_all(self, most: int | None) -> None:
        """Let the model answer all rows. Raises DataError where the metric finds a row's own completion wrong, or the
        user's function fails on it."""
        found = map(self.encoder.prompt, self.rows)
        self.prompts = [prompt for prompt in found if prompt is not None]  # a long one is cut later
        right = self._scored([prompt.reference for prompt in self.prompts])
        for number, prompt in enumerate(self.prompts, start=1):
            if self.metric != OWN and not right[number - 1]:
                text = f"the completion of held-out row {number}, {shown(prompt.reference)}, has no number"
                raise DataError(f"data.metric: {self.metric}: {text}; fix the row, or take exact or contains")
        tokenizer = self.encoder.tokenizer
        lengths = [len(text_ids(tokenizer, prompt.reference)) + 1 for prompt in self.prompts]  # with the end token
        usual = max(LEAST_TOKENS, math.ceil(ROOM * sorted(lengths)[math.ceil(0.99 * len(lengths)) - 1]))
        self.new_tokens = usual if most is None else most

    def _scored(self, answers: Sequence[str]) -> list[float]:
        """What the metric makes of an answer to each row."""
        told = list(zip(answers, self.prompts, self.rows, strict=True))
        if self.metric == OWN:
            return [own_metric().score(answer, row.own, row.where) for answer, _, row in told]
        return [float(RULES[str(self.metric)](answer, prompt.reference)) for answer, prompt, _ in told]

    def measure(self, model: Any, stage: Stage) -> None:
        """Score the held-out rows, if there are any, and let the model answer. Raises DataError where the user's metric
        can't score an answer."""
        if not self.rows:
            return
        logger.info("Scoring %d held-out rows", len(self.rows))
        self.measured[stage] = self.measure_once(model)
        if self.prompts:
            logger.info("Writing %d answers", len(self.prompts))
        prompts = [prompt.ids for prompt in self.prompts]
        self.written[stage] = continue_prompts(model, self.encoder.tokenizer, prompts, self.new_tokens)
        if self.metric:
            ids = (text_ids(self.encoder.tokenizer, text) for text in self.written[stage])
            if cut := sum(len(each) >= self.new_tokens for each in ids):
                told = "%d of %d answers were cut at %d tokens; raise data.answer_tokens if they should be longer"
                logger.info(told, cut, len(prompts), self.new_tokens)
            self.scored[stage] = self._scored(self.written[stage])

    def measure_once(self, model: Any) -> Measured:
        """The losses of the rows, and of choices which are right."""
        if not self.chooses:
            return Measured(row_losses(model, self.tokens, self.encoder.pad))
        every = [tokens for choices in self.choices for tokens in choices]
        scores = iter(score(model, every, self.encoder.pad, BATCH_TOKENS))
        nll, tokens, right = list[float](), list[int](), list[bool]()
        for row in self.rows:
            assert row.label is not None
            of_row = [next(scores) for _ in row.choices]
            losses = [sum(choice) for choice in of_row]
            nll.append(losses[row.label])
            tokens.append(len(of_row[row.label]))
            likeliest = row.choices[losses.index(min(losses))]  # equal choices are equally right
            right.append(math.isfinite(sum(losses)) and likeliest == row.choices[row.label])
        return Measured(Losses(nll, tokens), right)

    def diverge(self) -> None:
        """Note that training diverged: nothing is measured after it, and no loss is finite."""
        if not self.rows:
            return
        number = len(self.rows)
        right = (choices[row.label or 0] for choices, row in zip(self.choices, self.rows, strict=False))
        tokens = [each.trained for each in (right if self.chooses else self.tokens)]
        self.measured["after"] = Measured(Losses([math.nan] * number, tokens), [False] * number * self.chooses)
        self.written["after"] = [""] * len(self.prompts)

    def shares(self, stage: Stage) -> dict[str, Losses]:
        """The scores of rows, by what: of what is right the mean is a share."""
        found: dict[str, Sequence[float]] = {"accuracy": self.measured[stage].right}
        if self.metric and stage in self.scored:
            found[self.metric] = self.scored[stage]
        return {name: Losses(list(map(float, right)), [1] * len(right)) for name, right in found.items() if right}

    def scores(self) -> dict[str, dict[str, Any]]:
        """The scores of each stage, as ``metrics.json`` has them."""
        every: dict[str, dict[str, Any]] = {}
        for stage, found in self.measured.items():
            losses = found.losses
            scores: dict[str, Any] = {"rows": len(losses.nll), "tokens": sum(losses.tokens), "loss": losses.mean}
            scores |= {"loss_stderr": losses.stderr, "perplexity": losses.perplexity}
            for name, share in self.shares(stage).items():
                scores |= {name: share.mean, f"{name}_stderr": share.stderr}
            if found.right:
                labels = (row.choices[row.label or 0] for row in self.rows), (row.label for row in self.rows)
                scores["majority"] = max(max(Counter(each).values()) for each in labels) / len(self.rows)
            every[stage] = scores
        return every

    @property
    def gain(self) -> dict[str, float] | None:
        """What changed, with its standard error, paired by row; None unless both stages were scored."""
        if len(self.measured) < 2:
            return None
        change = self.measured["after"].losses.change_from(self.measured["before"].losses)
        gain = {"loss": change.mean, "loss_stderr": change.stderr}
        early = self.shares("before")
        for name, late in self.shares("after").items():
            change = late.change_from(early[name])
            gain |= {name: change.mean, f"{name}_stderr": change.stderr}
        return gain

    def lines(self) -> list[dict[str, Any]]:
        """What ``rows.jsonl.gz`` has of each row, by which any two runs can be paired."""
        copies: Counter[str] = Counter()
        lines = []
        tokens = next(iter(self.measured.values())).losses.tokens if self.measured else []
        for number, (row, count) in enumerate(zip(self.rows, tokens, strict=False)):
            digest = row.digest
            line: dict[str, Any] = {"digest": digest, "copy": copies[digest], "part": self.part, "tokens": count}
            line |= {"group": row.group} if row.group else {}
            copies[digest] += 1
            for stage, found in self.measured.items():
                line[stage] = found.losses.nll[number]
                if found.right:
                    line[f"right_{stage}"] = int(found.right[number])
                if self.metric:
                    line |= {"reference": self.prompts[number].reference, "own": row.own, "where": row.where}
                    line[f"answer_{stage}"] = self.written[stage][number]
            lines.append(line)
        return lines

    @property
    def samples(self) -> list[dict[str, str]]:
        """Question, reference answer, and what was written at each stage: as ``metrics.json`` has them."""
        return [
            {
                "question": prompt.text,
                "reference": prompt.reference,
                **{stage: texts[number] for stage, texts in self.written.items()},
            }
            for number, prompt in enumerate(self.prompts[: self.samples_shown])
        ]


class Forgetting:
    """Measures a model of the config ``base`` on all tokens of ``text`` before and after training, on at least so many
    ``tokens`` of it; a model without a BOS token is given the first one of each passage.

    The text is read at once: a mistake in the run's config shows before any work.
    """

    def __init__(self, text: str, tokens: int, tokenizer: PreTrainedTokenizerBase, base: PretrainedConfig) -> None:
        self.source, self.pad = text, pad_token(tokenizer)
        length = min(TEXT_TOKENS, positions_of(base) or TEXT_TOKENS)
        self.rows: list[Tokens] = []
        for passage in passages(text) if tokens else ():
            if sum(len(row.input_ids) for row in self.rows) < tokens:
                ids = text_ids(tokenizer, passage)[:length]
                self.rows.append(Tokens(ids, ids))
        self.losses: dict[str, Losses] = {}

    def measure(self, model: Any, stage: str) -> None:
        if self.rows:
            logger.info("Scoring %d passages of general text", len(self.rows))
            self.losses[stage] = row_losses(model, self.rows, self.pad)

    @property
    def metrics(self) -> dict[str, Any] | None:
        """What ``metrics.json`` has of it: the losses in nats per token, and their change with its standard error,
        paired by text; None if it was not measured."""
        if len(self.losses) < 2:
            return None
        before, after = self.losses["before"], self.losses["after"]
        change = after.change_from(before)
        return {
            "text": TITLE if self.source == STORY else Path(self.source).name,
            "passages": len(self.rows),
            "tokens": sum(before.tokens),
            "before": before.mean,
            "after": after.mean,
            "change": change.mean,
            "stderr": change.stderr,
        }


def continue_prompts(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], new_tokens: int, size: int = 0
) -> list[str]:
    """What the model writes after each prompt's token ids, in order, greedily, whatever its generation config says.

    Prompt and answer fit the model's positions, at most half of which the answer gets: a prompt that is too long for
    that loses its beginning. ``size`` prompts make a batch, by default as many as hold BATCH_TOKENS, at least eight.
    """
    texts: dict[int, str] = {}
    positions = positions_of(model.config)
    if positions is not None:
        new_tokens = min(new_tokens, positions // 2)
        prompts = [ids[new_tokens - positions :] for ids in prompts]
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    with scoring(model), greedily(model, tokenizer), progress("writing", len(order)) as bar:
        while order:
            most = size or max(8, BATCH_TOKENS // (len(prompts[order[0]]) + new_tokens))
            numbers, order = order[:most], order[most:]
            batch = [prompts[number] for number in numbers]
            inputs = left_padded(batch, pad_token(tokenizer), next(model.parameters()).device)
            written = model.generate(**inputs, max_new_tokens=new_tokens)
            answers = tokenizer.batch_decode(written[:, max(map(len, batch)) :], skip_special_tokens=True)
            texts.update(zip(numbers, map(str.strip, answers), strict=True))
            bar.update(len(numbers))
    return [texts[number] for number in range(len(prompts))]


@contextmanager
def greedily(model: Any, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Within it the model generates the likeliest token each time, whatever its own generation config says, which is
    put back: it is saved with a merged model. Settings given to ``generate`` would leave the others in force."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    own = base.generation_config
    base.generation_config = GenerationConfig(
        eos_token_id=ends_of(model, tokenizer), pad_token_id=pad_token(tokenizer), bos_token_id=own.bos_token_id
    )
    try:
        yield
    finally:
        base.generation_config = own


def ends_of(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """The tokens that end a text: those of the model's generation config, and the tokenizer's, with which answers are
    trained."""
    known = model.generation_config.eos_token_id
    return sorted({*(known if isinstance(known, list) else [known]), tokenizer.eos_token_id} - {None}) or None
