"""How many random pairs does each method recall, with equally many parameters?

    python studies/run.py recall-256 recall-512 recall-gemma-256

One study for each number of pairs. What is recalled is what the adapter holds: answers are drawn at random, and an
encoder's head is frozen as it was drawn.
"""

from __future__ import annotations

import random
from functools import cached_property
from typing import Any

from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from smoa_lab.config.run import RunConfig
from smoa_lab.data.rows import Row, choice_question, content_hash
from smoa_lab.data.tasks import Selection
from smoa_lab.study.runner import ClassificationRunner, Runner, encoder_folder
from smoa_lab.study.study import Study

CLASSES = tuple("ABCDEFGHIJKLMNOP")
WORDS = 128
"""So many first and so many second words, each a token of its own."""
HEAD_GAIN = 2.0


class Pairs(Runner):
    """Trains and scores the same random pairs, by a language model, which answers with the letter."""

    @cached_property
    def records(self) -> Selection:
        pairs = random_pairs(int(self.shared["data"]["train_examples"]))
        used = {"examples": len(pairs), "sha256": content_hash(pairs)}
        account = {"tasks": {}, "used": dict.fromkeys(("train", "validation", "test"), used)}
        return Selection(pairs, pairs, pairs, {"pairs": "text"}, account)

    def stored_config(self, config: RunConfig) -> dict[str, Any]:
        stored = super().stored_config(config)
        return {**stored, "data": {**stored["data"], "tasks": ["random pairs"]}}


class PairClasses(Pairs, ClassificationRunner):
    """By an encoder, under a head that stays as it is drawn."""

    def _adapted(self, config: RunConfig) -> tuple[Any, PreTrainedTokenizerBase]:
        model, tokenizer = super()._adapted(config)
        for name, module in model.named_modules():
            if name.endswith("classifier.modules_to_save.default"):
                nn.init.orthogonal_(module.weight, HEAD_GAIN)
                module.requires_grad_(False)
        return model, tokenizer


def random_pairs(count: int) -> list[Row]:
    """Names of two words, all different, each with a class drawn at random."""
    vocabulary = AutoTokenizer.from_pretrained(encoder_folder()).get_vocab()
    words = sorted(word for word in vocabulary if word.isascii() and word.isalpha() and 4 <= len(word) <= 8)
    draw = random.Random(0)
    chosen = draw.sample(words, 2 * WORDS)
    names = [f"{first} {second}" for first in chosen[:WORDS] for second in chosen[WORDS:]]
    drawn = draw.sample(names, len(names))[:count]
    return [choice_question("pairs", name, name, CLASSES, draw.randrange(len(CLASSES))) for name in drawn]


def runner_of(study: Study) -> Pairs:
    """What trains and scores an entry on the pairs."""
    kind = PairClasses if study.kind == "classification" else Pairs
    return kind(study.shared)


def sizes(count: int) -> list[str]:
    """The changes to a study's file for so many pairs."""
    return [f"shared.data.{part}_examples={count}" for part in ("train", "validation", "test")]
