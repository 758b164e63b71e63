"""Computes log-likelihoods of answers given prompts, and shares the work of a common prompt.

The choices of a question share its prompt. The prompt goes through the model once, but for its last token; its keys and
values are then repeated for each choice, and logits are computed at the answers' positions only. Batches are large: a
pass over a vocabulary of 262,144 costs about a second on a CPU however few its rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from smoa_lab.data.prompts import Encoded
from smoa_lab.scoring.answer_loss import answer_logits, answer_nll, answer_positions, collate, left_padded, logits_at
from smoa_lab.scoring.mode import scoring
from smoa_lab.scoring.row_losses import batches

# The numbers, in the caller's list, of sequences that share a prompt.
Group = list[int]


@dataclass(frozen=True)
class AnswerScore:
    """The negative log-likelihood of each answer token in nats, and whether greedy decoding would give this answer:
    every token of it is the likeliest at its place."""

    nll: tuple[float, ...]
    greedy: bool

    @property
    def loss(self) -> float:
        """The answer's negative log-likelihood."""
        return sum(self.nll)


def score_answers(model: nn.Module, sequences: Sequence[Encoded], pad: int, batch_tokens: int) -> list[AnswerScore]:
    """The score of each sequence's answer, in order. ``batch_tokens`` bounds the padded tokens of a batch.

    Dropout is off and no gradient is kept; the model's mode is restored.
    """
    found: dict[int, AnswerScore] = {}
    with scoring(model):
        for groups in _batches(sequences, batch_tokens):
            numbers = [number for group in groups for number in group]
            scores = _score_batch(model, [[sequences[number] for number in group] for group in groups], pad)
            found.update(zip(numbers, scores, strict=True))
    return [found[number] for number in range(len(sequences))]


def _batches(sequences: Sequence[Encoded], batch_tokens: int) -> Iterator[list[Group]]:
    """Neighbors with the same prompt are a group; groups of like length are a batch, longest first."""
    groups = [list(group) for _, group in groupby(range(len(sequences)), key=lambda number: sequences[number].prompt)]

    def cost(group: Group) -> int:
        longest = max(len(sequences[number].answer) for number in group)
        return len(sequences[group[0]].prompt) + len(group) * longest

    for numbers in batches([cost(group) for group in groups], batch_tokens):
        yield [groups[number] for number in numbers]


def _score_batch(model: nn.Module, groups: list[list[Encoded]], pad: int) -> list[AnswerScore]:
    """Scores of all sequences in order."""
    sequences = [sequence for group in groups for sequence in group]
    prompts = [group[0].prompt[:-1] for group in groups]
    repeats = torch.tensor([len(group) for group in groups])
    shared = _prompt_pass(model, prompts, repeats, pad) if int(repeats.max()) > 1 and all(prompts) else None
    # What is left of a sequence whose prompt is in the cache begins with the prompt's last token.
    rest = sequences if shared is None else [Encoded(s.prompt[-1:], s.answer) for s in sequences]
    batch = {name: tensor.to(_device(model)) for name, tensor in collate([one.row for one in rest], pad).items()}
    labels = batch.pop("labels")
    inputs: dict[str, Any] = {**batch, "use_cache": False} if shared is None else shared.continued_by(batch)
    with logits_at(model, answer_positions(labels)):
        logits = model(**inputs).logits
    counts = [len(sequence.answer) for sequence in sequences]
    nll = torch.split(answer_nll(logits, labels), counts)
    hits = torch.split(answer_logits(logits, labels).argmax(-1) == labels[labels >= 0], counts)
    return [AnswerScore(tuple(one.tolist()), bool(hit.all())) for one, hit in zip(nll, hits, strict=True)]


@dataclass(frozen=True)
class _PromptCache:
    """Keys and values of left-padded prompts, each repeated for its sequences, with ``mask`` (sequences, width).

    ``name`` is the model's own for them.
    """

    name: str
    keys_and_values: Any
    mask: Tensor

    def continued_by(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """The model's inputs for right-padded continuations."""
        lengths = self.mask.sum(dim=1, keepdim=True)
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": torch.cat([self.mask, batch["attention_mask"]], dim=1),
            "position_ids": lengths + batch["attention_mask"].cumsum(dim=1) - 1,  # padding takes no further positions
            self.name: self.keys_and_values,
        }


def _prompt_pass(model: nn.Module, prompts: list[list[int]], repeats: Tensor, pad: int) -> _PromptCache | None:
    """Run each prompt once; None where the model keeps no keys and values that can be repeated."""
    inputs = left_padded(prompts, pad, _device(model))
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with logits_at(model, torch.zeros_like(mask, dtype=torch.bool)):
        output = model(**inputs, position_ids=positions, use_cache=True)
    name = "cache" if hasattr(output, "cache") else "past_key_values"  # before transformers 5.24
    cache: Any = getattr(output, name, None)
    if not hasattr(cache, "batch_select_indices"):
        return None
    rows = torch.repeat_interleave(repeats).to(mask.device)
    cache.batch_select_indices(rows)
    return _PromptCache(name, cache, mask[rows])


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
