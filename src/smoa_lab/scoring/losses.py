"""Computes log-likelihoods of trained tokens, at their positions only, and shares the work of a common prompt.

With Gemma's vocabulary of 262,144 the output layer costs more than the rest of a 270M model, and most of its rows would
belong to tokens whose loss is never asked for. So the hidden states are gathered *before* the output layer, by a hook
on it: the model's own forward runs unchanged around it (soft-capping and scaling of logits, wrappers for several
processes), for every causal language model whose ``get_output_embeddings`` is applied to (batch, tokens, hidden).

The choices of a question share its prompt, which goes through the model once; its keys and values are then repeated for
each choice.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from smoa_lab.data.encoding import IGNORED, Tokens

logger = logging.getLogger(__name__)

BATCH_LOGITS = 2**28
"""Logits of a batch if every padded token has them: 1 GiB in float32, 1,024 tokens with Gemma's vocabulary."""


Score = tuple[float, ...]
"""The negative log-likelihood of each trained token of a row, in nats."""


@dataclass(frozen=True)
class Losses:
    """The negative log-likelihood of each row in nats, and the tokens that it is over."""

    nll: list[float]
    tokens: list[int]

    @property
    def mean(self) -> float:
        """Nats per token."""
        return sum(self.nll) / sum(self.tokens)

    @property
    def stderr(self) -> float:
        """The standard error of :attr:`mean`, a ratio of sums, rows drawn at random; NaN for one row."""
        mean, rows = self.mean, len(self.nll)
        if rows < 2:
            return math.nan
        squares = sum((loss - mean * size) ** 2 for loss, size in zip(self.nll, self.tokens, strict=True))
        return math.sqrt(squares * rows / (rows - 1)) / sum(self.tokens)

    @property
    def perplexity(self) -> float:
        """The exponential of :attr:`mean`; infinity where a float can't hold it."""
        try:
            return math.exp(self.mean)
        except OverflowError:
            return math.inf

    def change_from(self, before: Losses) -> Losses:
        """How much each row's rose from ``before``, of the same rows: by its mean the mean did."""
        return Losses([late - early for early, late in zip(before.nll, self.nll, strict=True)], self.tokens)


def row_losses(model: nn.Module, rows: Sequence[Tokens], pad: int) -> Losses:
    """The losses of rows, in order. ``pad`` is the token that fills a batch."""
    vocabulary = cast(Any, model).config.get_text_config().vocab_size
    scores = score(model, rows, pad, BATCH_LOGITS // vocabulary, share_prompts=False)
    return Losses(list(map(sum, scores)), list(map(len, scores)))


def score(
    model: nn.Module, rows: Sequence[Tokens], pad: int, batch_tokens: int, share_prompts: bool = True
) -> list[Score]:
    """The score of each row, in order. ``batch_tokens`` bounds the padded tokens of a batch; neighbors with the same
    prompt share its work, if they may.

    Dropout is off and no gradient is kept; the model's mode is restored.
    """
    prompts = [row.prompt if share_prompts else number for number, row in enumerate(rows)]
    groups = [list(group) for _, group in groupby(range(len(rows)), key=lambda number: prompts[number])]

    def cost(group: list[int]) -> int:
        return rows[group[0]].start + len(group) * max(len(rows[number].answer) for number in group)

    scores: dict[int, Score] = {}
    with scoring(model), progress("scoring", len(rows)) as bar:
        for chosen in batches([cost(group) for group in groups], batch_tokens):
            numbers = [number for place in chosen for number in groups[place]]
            batch = _score_batch(model, [[rows[number] for number in groups[place]] for place in chosen], pad)
            scores.update(zip(numbers, batch, strict=True))
            bar.update(len(numbers))
    return [scores[number] for number in range(len(rows))]


def progress(what: str, total: int) -> Any:
    """A bar on a terminal, in the process that shows the lab's log."""
    shown = total > 0 and logger.isEnabledFor(logging.INFO)
    return tqdm(desc=what, total=total, leave=False, disable=None if shown else True)


def batches(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """The numbers of the rows, the longest first, in batches of at most ``most`` padded tokens, or of one row."""
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > most:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _score_batch(model: nn.Module, groups: list[list[Tokens]], pad: int) -> list[Score]:
    rows = [row for group in groups for row in group]
    prompts = [group[0].prompt for group in groups]
    prompt_of = torch.tensor([place for place, group in enumerate(groups) for _ in group])
    longer = [number for number, row in enumerate(rows) if row.trained > 1]
    may_share = len(rows) > len(groups) and all(prompts) and all(row.answer for row in rows)
    shared = _prompt_pass(model, prompts, prompt_of[longer], pad) if may_share else None
    if shared is None:
        return _predicted(model, rows, pad)
    logits, past, mask = shared
    prompt_of, first = prompt_of.to(logits.device), torch.tensor([row.answer[0] for row in rows], device=logits.device)
    nll = -F.log_softmax(logits.float(), dim=-1)[prompt_of, first]
    answers = [Tokens(rows[number].answer, rows[number].labels[rows[number].start :]) for number in longer]
    others = dict(zip(longer, _predicted(model, answers, pad, past, mask), strict=True)) if longer else {}
    return [(loss, *others.get(number, ())) for number, loss in enumerate(nll.tolist())]


def _predicted(
    model: nn.Module, rows: list[Tokens], pad: int, past: dict[str, Any] | None = None, mask: Tensor | None = None
) -> list[Score]:
    """Of each row the losses of its trained tokens, the first of all apart. ``past`` has the keys and values of what
    comes before the rows, and ``mask`` tells them from padding."""
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in collate([row.columns for row in rows], pad).items()}
    labels = batch.pop("labels")[:, 1:]
    wanted = labels != IGNORED
    if not wanted.any():
        return [() for _ in rows]
    inputs: dict[str, Any] = {name: tensor[:, :-1] for name, tensor in batch.items()}  # the last one predicts nothing
    if past is None or mask is None:
        inputs["use_cache"] = False
    else:
        own = inputs["attention_mask"]
        positions = mask.sum(dim=1, keepdim=True) + own.cumsum(dim=1) - 1  # none for padding
        inputs |= {"attention_mask": torch.cat([mask, own], dim=1), "position_ids": positions, **past}
    with logits_at(model, wanted):
        logits = wanted_logits(model(**inputs).logits, wanted)
    targets = labels[wanted].to(logits.device)
    nll = F.cross_entropy(logits.float(), targets, reduction="none")
    return [tuple(losses.tolist()) for losses in torch.split(nll, [row.trained for row in rows])]


def _prompt_pass(
    model: nn.Module, prompts: list[list[int]], prompt_of: Tensor, pad: int
) -> tuple[Tensor, dict[str, Any], Tensor] | None:
    """Run each prompt once, padded left: the logits after each (prompts, vocabulary), keys and values by the model's
    name for them, for each row those of its prompt, and their mask (rows, width). None where the model keeps none that
    can be repeated."""
    device = next(model.parameters()).device
    inputs = left_padded(prompts, pad, device)
    mask = inputs["attention_mask"]
    last = torch.zeros_like(mask, dtype=torch.bool)
    last[:, -1] = True
    with logits_at(model, last):
        output = model(**inputs, position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0), use_cache=True)
    name = "cache" if hasattr(output, "cache") else "past_key_values"  # before transformers 5.24
    cache: Any = getattr(output, name, None)
    recurrent = any(hasattr(layer, "conv_states") for layer in getattr(cache, "layers", ()))  # linear attention's
    if recurrent or not hasattr(cache, "batch_select_indices"):
        return None
    cache.batch_select_indices(prompt_of.to(device))
    return wanted_logits(output.logits, last), {name: cache}, mask[prompt_of.to(device)]


@contextmanager
def scoring(model: nn.Module) -> Iterator[None]:
    """Switch dropout off and keep no gradient within the block; afterwards the model's mode is restored."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


@contextmanager
def logits_at(model: nn.Module, positions: Tensor) -> Iterator[None]:
    """Let ``model(...).logits`` be (1, N, vocabulary) within the block: those at ``positions`` (batch, tokens; bool).

    A model that applies its output layer to something else gives all logits.
    """
    head: nn.Module = cast(Any, model).get_output_embeddings()

    def keep(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = inputs[0]
        if hidden.shape[:2] != positions.shape:
            return inputs
        return (hidden[positions].unsqueeze(0), *inputs[1:])

    handle = head.register_forward_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()


def answer_positions(labels: Tensor) -> Tensor:
    """(batch, tokens) bool: the positions whose *next* token is to be predicted."""
    return F.pad(labels[:, 1:] != IGNORED, (0, 1))


def wanted_logits(logits: Tensor, positions: Tensor) -> Tensor:
    """(N, vocabulary): the logits at N ``positions``, from those under :func:`logits_at` or from all."""
    return logits[positions] if logits.shape[:2] == positions.shape else logits.reshape(-1, logits.shape[-1])


def collate(rows: Sequence[dict[str, list[int]]], pad: int) -> dict[str, Tensor]:
    """Right-padded ``input_ids``, ``attention_mask`` and ``labels``, each (batch, tokens) int64."""
    width = max(len(row["input_ids"]) for row in rows)

    def padded(values: list[list[int]], filler: int) -> Tensor:
        return torch.tensor([row + [filler] * (width - len(row)) for row in values], dtype=torch.long)

    return {
        "input_ids": padded([row["input_ids"] for row in rows], pad),
        "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": padded([row["labels"] for row in rows], IGNORED),
    }


def left_padded(prompts: list[list[int]], pad: int, device: torch.device) -> dict[str, Tensor]:
    """Left-padded ``input_ids`` and ``attention_mask``, each (batch, tokens) int64: all prompts end side by side."""
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}
