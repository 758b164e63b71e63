"""How much of what an adapter changes is in another model: by the logits after ten prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from smoa_lab.data.general_text import STORY, passages
from smoa_lab.scoring.losses import logits_at

PROMPTS, WORDS = 10, 24
"""How many prompts there are, and how long each is."""


def prompt_texts() -> list[str]:
    """The beginnings of passages of general text."""
    return [" ".join(text.split()[:WORDS]) for text in passages(STORY)[:PROMPTS]]


@torch.no_grad()
def logits_after(model: Any, ids: Sequence[Tensor]) -> Tensor:
    """Those after each prompt, in float32: (prompts, vocabulary)."""
    model.eval()
    found = []
    for each in ids:
        with logits_at(model, torch.arange(each.shape[1])[None] == each.shape[1] - 1):
            found.append(model(input_ids=each.to(model.device)).logits[:, -1].float().cpu())
    return torch.cat(found)


def share_and_noise(change: Tensor, found: Tensor) -> tuple[float, float]:
    """⟨found, change⟩ / ‖change‖², and ‖what else was found‖ / ‖change‖, of two changes of logits."""
    change, found = change.double(), found.double()
    size = float(change.square().sum())
    share = float((change * found).sum()) / size
    return share, float((found - share * change).norm()) / size**0.5
