"""A loss on the answers that computes logits at answer positions only.

With Gemma's vocabulary of 262,144 the output layer costs more than the rest of a 270M model; most of its rows would
belong to prompt tokens, whose loss is never asked for. So the hidden states are gathered *before* the output layer, by
a hook on it: the model's own forward runs unchanged around it (soft-capping and scaling of logits, wrappers for several
processes), for every causal language model whose ``get_output_embeddings`` is applied to (batch, tokens, hidden).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer

from smoa_lab.data.prompts import IGNORED

logger = logging.getLogger(__name__)


@contextmanager
def logits_at(model: nn.Module, positions: Tensor) -> Iterator[None]:
    """Let ``model(...).logits`` be (1, N, vocabulary) within the block: those at ``positions`` (batch, tokens; bool).

    A model without an output layer of its own, or one that applies it to something else, gives all logits.
    """
    getter: Any = getattr(model, "get_output_embeddings", None)
    head: nn.Module | None = None if getter is None else getter()
    if head is None:
        logger.warning("%s has no output embeddings: all logits are computed", type(model).__name__)
        yield
        return

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
    wanted = torch.zeros_like(labels, dtype=torch.bool)
    wanted[:, :-1] = labels[:, 1:] != IGNORED
    return wanted


def answer_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """(N,) negative log-likelihoods, float32, of the N answer tokens from the logits at their positions or from all."""
    targets = labels[:, 1:][labels[:, 1:] != IGNORED]
    return F.cross_entropy(answer_logits(logits, labels).float(), targets.to(logits.device), reduction="none")


def answer_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """(N, vocabulary): the logits that predict the N answer tokens, from those under :func:`logits_at` or from all."""
    if logits.shape[:2] == labels.shape:
        return logits[answer_positions(labels)]
    return logits.reshape(-1, logits.shape[-1])


def mean_answer_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """The Trainer's ``compute_loss_func``: the mean over the answer tokens of the whole accumulated batch."""
    nll = answer_nll(outputs.logits, labels)
    return nll.mean() if num_items_in_batch is None else nll.sum() / num_items_in_batch


class AnswerTrainer(Trainer):
    """The Trainer with :func:`mean_answer_loss`; accumulation and several processes stay the Trainer's own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "compute_loss_func": mean_answer_loss})
        self.args.remove_unused_columns = False
        self.args.prediction_loss_only = True

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        plain: nn.Module = self.accelerator.unwrap_model(model)
        with logits_at(plain, answer_positions(inputs["labels"])):
            return super().compute_loss(model, inputs, *args, **options)


def collate(rows: list[dict[str, list[int]]], pad: int) -> dict[str, Tensor]:
    """Right-padded ``input_ids``, ``attention_mask`` and ``labels``, each (batch, tokens) int64."""
    width = max(len(row["input_ids"]) for row in rows)

    def padded(values: list[list[int]], filler: int) -> Tensor:
        return torch.tensor([one + [filler] * (width - len(one)) for one in values], dtype=torch.long)

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
