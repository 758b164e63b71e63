"""Log-likelihoods of answers given prompts, with no work done twice.

The choices of a question share its prompt. The prompt goes through the model once, but for its last token; its keys and
values are then repeated for each choice, and logits are computed at the answers' positions only. Questions are batched
by equal prompt length, so that nothing is padded before an answer. For short answers this is two to three times
faster than scoring prompt and choice together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from smoa.experiments.answer_loss import answer_nll, answer_positions, collate, logits_at
from smoa.experiments.prompts import Encoded

# The numbers, in the caller's list, of sequences that share a prompt.
Group = list[int]


def sequence_losses(
    model: nn.Module, sequences: Sequence[Encoded], pad: int, batch_tokens: int
) -> list[tuple[float, int]]:
    """For each sequence the sum of its answer tokens' negative log-likelihoods in nats, and their number, in order.

    ``batch_tokens`` bounds the padded tokens of a batch. Dropout is off and no gradient kept; the mode is put back.
    """
    found: list[tuple[float, int]] = [(math.nan, 0)] * len(sequences)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for groups in _batches(sequences, batch_tokens):
                numbers = [number for group in groups for number in group]
                nll = _batch_nll(model, [[sequences[number] for number in group] for group in groups], pad)
                counts = [len(sequences[number].answer) for number in numbers]
                for number, part in zip(numbers, torch.split(nll, counts), strict=True):
                    found[number] = (float(part.sum()), len(part))
    finally:
        model.train(was_training)
    return found


def _batches(sequences: Sequence[Encoded], batch_tokens: int) -> Iterator[list[Group]]:
    """Groups of neighbours with the same prompt, batched by equal prompt length, longest first."""
    groups = [list(group) for _, group in groupby(range(len(sequences)), key=lambda number: sequences[number].prompt)]

    def prompt_length(group: Group) -> int:
        return len(sequences[group[0]].prompt)

    def cost(group: Group) -> int:
        return prompt_length(group) + len(group) * max(len(sequences[number].answer) for number in group)

    for _, alike in groupby(sorted(groups, key=prompt_length, reverse=True), key=prompt_length):
        batch: list[Group] = []
        for group in sorted(alike, key=cost, reverse=True):
            if batch and (len(batch) + 1) * cost(batch[0]) > batch_tokens:
                yield batch
                batch = []
            batch.append(group)
        yield batch


def _batch_nll(model: nn.Module, groups: list[list[Encoded]], pad: int) -> Tensor:
    """(N,) for the N answer tokens of all sequences in order; all prompts are equally long."""
    sequences = [sequence for group in groups for sequence in group]
    shared = len(sequences[0].prompt) - 1
    cache = _prompt_cache(model, [group[0].prompt[:shared] for group in groups], [len(group) for group in groups])
    skipped = 0 if cache is None else shared
    batch = collate([Encoded(s.prompt[skipped:], s.answer, ends=s.ends) for s in sequences], pad)
    device = _device(model)
    labels = batch["labels"].to(device)
    # No attention mask: what is padded comes after the answers, where causal attention never looks.
    with logits_at(model, answer_positions(labels)):
        options = {"use_cache": False} if cache is None else {"past_key_values": cache}
        logits = model(input_ids=batch["input_ids"].to(device), **options).logits
    return answer_nll(logits, labels)


def _prompt_cache(model: nn.Module, prompts: list[list[int]], repeats: list[int]) -> Any:
    """Keys and values of the prompts, each repeated for its sequences; None where the model keeps none, or where
    nothing would be gained."""
    if not prompts[0] or max(repeats) == 1:
        return None
    ids = torch.tensor(prompts, device=_device(model))
    with logits_at(model, torch.zeros_like(ids, dtype=torch.bool)):
        cache: Any = getattr(model(input_ids=ids, use_cache=True), "past_key_values", None)
    if not hasattr(cache, "batch_select_indices"):
        return None
    cache.batch_select_indices(torch.repeat_interleave(torch.tensor(repeats)).to(ids.device))
    return cache


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
