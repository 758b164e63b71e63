"""What a model shows before and after training: on held-out rows loss, accuracy and sample answers, and on general text
the loss, whose rise is what the training forgot."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils.logging import warning_once

from smoa.errors import DataError
from smoa_lab.base_models import positions_of
from smoa_lab.data.answers import ANSWERED, OWN, RULES, MetricName, is_one_number
from smoa_lab.data.encoding import Encoder, Tokens, pad_token, text_ids
from smoa_lab.data.formats import shown
from smoa_lab.data.general_text import STORY, TITLE, passages
from smoa_lab.data.own_metric import own_metric
from smoa_lab.data.row import Row
from smoa_lab.scoring.losses import Losses, left_padded, progress, row_losses, score, scoring

logger = logging.getLogger(__name__)

Stage = Literal["before", "after"]
NEW_TOKENS, CHOICE_TOKENS = 128, 24
"""The most tokens of a sample answer, and of one to a row with choices."""
LEAST_TOKENS, ROOM = 32, 1.25
"""The least that a scored answer has, and what it has of the references' 99th percentile."""
BETA = 0.1
"""TRL's default of DPO's β."""
BATCH_TOKENS = 4096
"""Padded tokens of a batch of choices, or of answers."""


def _softplus(x: float) -> float:
    """log(1 + eˣ), without overflow."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


DpoLoss = Callable[[float, float, float], float]
DPO_LOSSES: dict[str, DpoLoss] = {
    "sigmoid": lambda beta, margin, _: _softplus(-beta * margin),  # arXiv:2305.18290, equation 7
    "sigmoid_norm": lambda beta, _, by_token: _softplus(-beta * by_token),
    "hinge": lambda beta, margin, _: max(1 - beta * margin, 0.0),  # in this order NaN stays
    "ipo": lambda beta, _, by_token: (by_token - 1 / (2 * beta)) ** 2,  # arXiv:2310.12036, equation 17
}
"""TRL's losses of preferences by ``loss_type``: of β, the margin, and the margin of log-likelihoods per token."""
CHANGES_LOSS: dict[str, tuple[Any, ...]] = {
    "ld_alpha": (None, 1.0),
    "use_weighting": (None, False),
    "loss_weights": (None, [1.0]),
    "f_divergence_type": (None, "reverse_kl"),
}
"""Keys of TRL's DPO that make another loss of these, and the values that don't."""
GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
"""Without what a model's generation config may have for sampling alone."""
LIKELIEST: dict[str, Any] = {
    **GREEDY,
    **dict.fromkeys(("bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens", "stop_strings")),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "min_new_tokens", "max_time", "guidance_scale")),
    **dict.fromkeys(("exponential_decay_length_penalty", "watermarking_config", "prompt_lookup_num_tokens")),
    **dict.fromkeys(("min_length", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), 0),
    **dict.fromkeys(("num_beams", "num_return_sequences", "repetition_penalty", "encoder_repetition_penalty"), 1),
    "return_dict_in_generate": False,
}
"""Nor what else it may have that makes an answer another one than the likeliest token each time."""


def changes_loss(training: Mapping[str, Any]) -> list[str]:
    """The keys of a ``training`` block that make another loss of :data:`DPO_LOSSES`."""
    return [key for key, usual in CHANGES_LOSS.items() if training.get(key) not in usual]


def dpo_loss_of(training: Mapping[str, Any]) -> DpoLoss | None:
    """The loss of preferences of a ``training`` block: TRL's default without a ``loss_type``, None where it is another
    than :data:`DPO_LOSSES`."""
    named = training.get("loss_type") or "sigmoid"
    name = named[0] if isinstance(named, list) and len(named) == 1 else named
    return DPO_LOSSES.get(name) if isinstance(name, str) and not changes_loss(training) else None


@dataclass(frozen=True)
class Measured:
    """What a model makes of rows, in their order: the negative log-likelihoods of their completions; of choices, which
    is that of the right one without what ends it, whether it is the likeliest; of preferences that of the rejected
    completions."""

    losses: Losses
    right: Sequence[bool] = ()
    rejected: Sequence[float] = ()


class Evaluation:
    """Measures a model on held-out ``rows`` of a ``part`` before and after training, and lets it answer the first
    ``samples``, or all for a ``metric`` of answers, each in at most ``answer_tokens``. Each row is tokenized once.
    ``beta`` is DPO's, as is the loss, None where it is not known."""

    def __init__(
        self,
        encoder: Encoder,
        rows: Sequence[Row],
        samples: int = 0,
        part: str = "test",
        beta: float = BETA,
        metric: MetricName | None = None,
        dpo_loss: DpoLoss | None = DPO_LOSSES["sigmoid"],
        answer_tokens: int | None = None,
    ) -> None:
        self.encoder, self.rows, self.part, self.beta = encoder, rows, part, beta
        self.dpo_loss = dpo_loss
        self.prefers = bool(rows) and rows[0].rejected is not None
        self.chooses = bool(rows) and bool(rows[0].choices)
        self.choices = [encoder.choices(row) for row in rows] if self.chooses else []
        self.tokens = [] if self.chooses else [encoder.encode(row) for row in rows]
        self.rejected = [encoder.encode(row, rejected=True) for row in rows] if self.prefers else []
        self.metric, self.samples_shown = metric if metric in ANSWERED else None, samples
        prompts = (encoder.prompt(row, encoder.max_length) for row in rows[:samples])
        self.prompts = [prompt for prompt in prompts if prompt is not None]
        self.new_tokens = CHOICE_TOKENS if self.chooses else NEW_TOKENS
        if metric is not None and rows:
            self._answers(metric, answer_tokens)
        self.measured: dict[Stage, Measured] = {}
        self.written: dict[Stage, list[str]] = {}
        self.scored: dict[Stage, list[float]] = {}

    def _answers(self, metric: MetricName, most: int | None) -> None:
        """Have all rows answered, if the metric takes answers; raises DataError where rows lack what it scores, or a
        completion isn't right by it, or the user's own can't score it."""
        has_prompts = bool(self.rows[0].prompt) or not self.rows[0].is_text
        if self.prefers or not (self.chooses if metric == "choice" else has_prompts):
            needs = "one of several choices" if metric == "choice" else "the answer to a prompt"
            raise DataError(f"data.metric: {metric} scores {needs}, and these rows have none; leave it out")
        if self.metric is None:
            return
        found = map(self.encoder.prompt, self.rows)
        self.prompts = [prompt for prompt in found if prompt is not None]  # all: of one that is too long the end
        right = self._scored([prompt.reference for prompt in self.prompts])
        for number, prompt in enumerate(self.prompts, start=1):
            if metric != OWN and not right[number - 1]:
                text = f"the completion of held-out row {number}, {shown(prompt.reference)}, has no number"
                raise DataError(f"data.metric: {metric}: {text}; fix the row, or take exact or contains")
        unclear = sum(not is_one_number(prompt.reference) for prompt in self.prompts) if metric == "number" else 0
        if unclear:
            told = "have several numbers without ####, or none that is one; the last one is compared as it is written"
            warning_once(logger, f"data.metric: number: {unclear} of {len(self.prompts)} completions {told}")
        tokenizer = self.encoder.tokenizer
        lengths = [len(text_ids(tokenizer, prompt.reference)) + 1 for prompt in self.prompts]  # and its end
        usual = max(LEAST_TOKENS, math.ceil(ROOM * sorted(lengths)[math.ceil(0.99 * len(lengths)) - 1]))
        self.new_tokens = usual if most is None else most
        if cut := sum(length > self.new_tokens for length in lengths):
            told = (
                f"have more than {self.new_tokens} tokens, and no answer as long is written; raise data.answer_tokens"
            )
            warning_once(logger, f"data.metric: {cut} of {len(lengths)} completions {told}")

    def _scored(self, answers: Sequence[str]) -> list[float]:
        """What the metric makes of an answer to each row."""
        told = list(zip(answers, self.prompts, self.rows, strict=True))
        if self.metric == OWN:
            return [own_metric().score(answer, row.own, row.where) for answer, _, row in told]
        return [float(RULES[str(self.metric)](answer, prompt.reference)) for answer, prompt, _ in told]

    def measure(self, model: Any, stage: Stage) -> None:
        """Score the held-out rows, if there are any, and let the model answer. Raises DataError, with the answers
        kept, where the user's metric can't score one."""
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
                logger.info("%d of %d answers were cut at %d tokens", cut, len(prompts), self.new_tokens)
            self.scored[stage] = self._scored(self.written[stage])

    def measure_once(self, model: Any) -> Measured:
        if not self.chooses:
            rejected = row_losses(model, self.rejected, self.encoder.pad).nll if self.prefers else []
            return Measured(row_losses(model, self.tokens, self.encoder.pad), rejected=rejected)
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
        number, nothing = len(self.rows), [math.nan] * len(self.rows)
        right = (choices[row.label or 0] for choices, row in zip(self.choices, self.rows, strict=False))
        losses = Losses(nothing, [tokens.trained for tokens in (right if self.chooses else self.tokens)])
        if number:
            self.measured["after"] = Measured(losses, [False] * number * self.chooses, nothing * self.prefers)
            self.written["after"] = [""] * len(self.prompts)

    def shares(self, stage: Stage) -> dict[str, Losses]:
        """The scores of rows, by what: of what is right the mean is a share."""
        found: dict[str, Sequence[float]] = {"accuracy": self.measured[stage].right}
        if self.metric and stage in self.scored:
            found[self.metric] = self.scored[stage]
        return {name: Losses(list(map(float, right)), [1] * len(right)) for name, right in found.items() if right}

    def scores(self) -> dict[str, dict[str, Any]]:
        """The scores of each stage, as ``metrics.json`` has them; those of preferences need both."""
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
            if self.dpo_loss and self.prefers and stage == "before":
                scores["dpo_loss"] = self.dpo_loss(self.beta, 0.0, 0.0)
            every[stage] = scores
        if rows := self.preferences:
            every["after"] |= {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        return every

    @property
    def preferences(self) -> list[dict[str, float]]:
        """Of each row with a preference the trainer's loss, where it is known here; by how much the odds of the better
        completion against the other rose, as logarithms: DPO's margin divided by β; and whether they did. None before
        both stages are scored."""
        if not self.prefers or len(self.measured) < 2:
            return []
        (good, bad), (good_after, bad_after) = (
            (np.array(self.measured[stage].losses.nll), np.array(self.measured[stage].rejected))
            for stage in ("before", "after")
        )
        m, n = (np.array([max(1, each.trained) for each in tokens]) for tokens in (self.tokens, self.rejected))
        with np.errstate(invalid="ignore"):  # of a run that diverged
            margins = (bad_after - good_after) - (bad - good)
            by_token = (bad_after / n - good_after / m) - (bad / n - good / m)
        return [
            ({"dpo_loss": self.dpo_loss(self.beta, *pair)} if self.dpo_loss else {})
            | {"margin": pair[0], "won": int(pair[0] > 0)}
            for pair in zip(margins.tolist(), by_token.tolist(), strict=True)
        ]

    @property
    def gain(self) -> dict[str, float] | None:
        """What changed, with its standard error, paired by row; None unless both stages were scored."""
        if len(self.measured) < 2:
            return None
        before, after = self.measured["before"], self.measured["after"]
        change = after.losses.change_from(before.losses)
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
        preferences = self.preferences
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
                if self.metric == OWN and stage in self.scored:
                    line |= {f"scored_{stage}": self.scored[stage][number], "scored_by": own_metric().name}
            if preferences:
                before = {"dpo_loss_before": self.dpo_loss(self.beta, 0.0, 0.0)} if self.dpo_loss else {}
                line |= preferences[number] | before
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


TEXT_TOKENS = 256
"""A longer text is cut at its end, and a shorter one where the model takes less."""


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
    that loses its head. ``size`` prompts make a batch, by default as many as hold BATCH_TOKENS, and eight at least.
    """
    texts: dict[int, str] = {}
    pad = pad_token(tokenizer)
    positions = positions_of(model.config)
    if positions is not None:
        new_tokens = min(new_tokens, positions // 2)
        room = positions - new_tokens
        # BOS stays where the prompt begins with it
        heads = [ids[:1] if ids[:1] == [tokenizer.bos_token_id] else [] for ids in prompts]
        prompts = [
            ids if len(ids) <= room else head + ids[len(ids) - room + len(head) :]
            for ids, head in zip(prompts, heads, strict=True)
        ]
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    with scoring(model), progress("writing", len(order)) as bar:
        while order:
            most = size or max(8, BATCH_TOKENS // (len(prompts[order[0]]) + new_tokens))
            numbers, order = order[:most], order[most:]
            batch = [prompts[number] for number in numbers]
            written = model.generate(
                **left_padded(batch, pad, next(model.parameters()).device),
                max_new_tokens=new_tokens,
                pad_token_id=pad,
                eos_token_id=ends_of(model, tokenizer),
                **LIKELIEST,
            )
            answers = tokenizer.batch_decode(written[:, max(map(len, batch)) :], skip_special_tokens=True)
            texts.update(zip(numbers, map(str.strip, answers), strict=True))
            bar.update(len(numbers))
    return [texts[number] for number in range(len(prompts))]


def ends_of(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """The tokens that end a text: those of the model's generation config, and the tokenizer's, with which answers are
    trained."""
    known = model.generation_config.eos_token_id
    return sorted({*(known if isinstance(known, list) else [known]), tokenizer.eos_token_id} - {None}) or None
