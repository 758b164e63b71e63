"""Bases, rows and readers of `tests/golden`: what the code of commit 1eaf65e9 made, to which today's is held.

`tests/golden/make.py` of the commit "Keep golden files of commit 1eaf65e9" made them, in a clone of that one. What 0.2
lacks was taken out of its adapters. Weights come from NumPy's RandomState, whose stream never changes.
"""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from smoa_lab.data.encoding import Tokens
from tests.support import tiny_mixtures, tiny_models
from tests.support.lab import saved, tiny_llama
from tests.support.own_rows import PLAIN, tokenizer_with

GOLDEN = Path(__file__).parents[1] / "golden"


class Small(nn.Module):
    """One layer of each other kind: an embedding, two convolutions, a linear layer with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(17, 8)
        self.line = nn.Conv1d(8, 12, 3, padding=1)
        self.grouped = nn.Conv2d(4, 8, (2, 1), groups=2)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.line(self.table(ids).transpose(1, 2)).view(len(ids), 4, 3, -1)
        found: Tensor = self.head(self.grouped(x).mean((2, 3)))
        return found


BASES: dict[str, Callable[[], nn.Module]] = {
    "llama": tiny_models.llama,
    "gemma3": tiny_models.gemma3,
    "gpt2": tiny_models.gpt2,
    "qwen3_moe": tiny_mixtures.qwen3_moe,
    "gpt_oss": tiny_mixtures.gpt_oss,
    "small": Small,
}


@torch.no_grad()
def filled(model: nn.Module) -> Any:
    """The model with weights that are the same on every machine and with every PyTorch."""
    draw = np.random.RandomState(0)
    for name, parameter in model.named_parameters():
        values = torch.from_numpy(draw.standard_normal(tuple(parameter.shape))).float()
        parameter.copy_(1 + 0.1 * values if "norm" in name or "ln_" in name else 0.3 * values)
    return model.eval()


def base(name: str) -> Any:
    """A base of the adapters."""
    return filled(BASES[name]())


@torch.no_grad()
def output(model: nn.Module, name: str) -> Tensor:
    """What the model, adapted or not, says to fixed tokens."""
    limit = 17 if name == "small" else tiny_models.VOCAB_SIZE
    ids = torch.from_numpy(np.random.RandomState(1).randint(3, limit, (2, 9)))
    found: Any = model(ids)
    return (found if isinstance(found, Tensor) else found.logits).float().clone()


def language_model(folder: Path) -> Path:
    """The base of the runs, saved with a byte tokenizer and a chat template without marks."""
    tokenizer = tokenizer_with(PLAIN)
    model: PreTrainedModel = filled(tiny_llama(len(tokenizer), positions=1024))
    return saved(model, tokenizer, folder)


def rows(format: str, count: int = 20) -> list[dict[str, Any]]:
    """Rows of a format, all different, among them some with several turns, white space and letters of two bytes."""
    return _stored("rows")[format][:count]


def plain(tokens: Tokens) -> list[list[int]]:
    """As the golden files have them."""
    return [tokens.input_ids, tokens.labels]


def tokens() -> dict[str, list[Any]]:
    """The ids and labels of each format and way to encode it, by name; a question has one pair for each answer."""
    return _stored("tokens")


def _stored(name: str) -> dict[str, list[Any]]:
    with gzip.open(GOLDEN / f"{name}.json.gz", "rt", encoding="utf-8") as file:
        found: dict[str, list[Any]] = json.load(file)
    return found
