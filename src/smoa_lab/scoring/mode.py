"""Puts a model into the mode in which it is scored, and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


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
