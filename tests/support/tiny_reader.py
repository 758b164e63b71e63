"""A random model of an embedding, a convolution and a head, which takes token ids and labels as transformers' do."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.support.tiny_models import SEED, VOCAB_SIZE

WIDTH = 24
TARGETS = ["embed", "conv"]


class ReaderBlock(nn.Module):
    """A convolution over the tokens so far; what FSDP shards as one unit."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, kernel_size=3, padding=2, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x.mT).mT[:, : x.shape[1]].tanh()


class Reader(nn.Module):
    """Predicts the next token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB_SIZE, WIDTH)
        self.block = ReaderBlock()
        self.head = nn.Linear(WIDTH, VOCAB_SIZE)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(self.block(self.embed(input_ids)))
        loss = None if labels is None else cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(logits=logits, loss=loss)


def build_reader() -> Reader:
    """The same weights every time, whatever was drawn before."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return Reader()
