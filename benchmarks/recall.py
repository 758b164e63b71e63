"""How many random pairs does each method recall, with equally many parameters?

    python benchmarks/recall.py recall.yaml 256 512 1024 [--only ENTRY ...]
    python benchmarks/recall.py recall-gemma.yaml 256

One study for each number of pairs, in benchmarks/results/recall-NUMBER or recall-gemma-NUMBER. What is recalled is what
the adapter holds: answers are drawn at random, and an encoder's head is frozen as it was drawn.
"""

from __future__ import annotations

import argparse
import random
from functools import cached_property
from pathlib import Path
from typing import Any

from _studies import run_study
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from smoa_lab.config.run import RunConfig
from smoa_lab.data.rows import Row, choice_question, content_hash
from smoa_lab.data.tasks import Selection
from smoa_lab.study.classification import ClassificationRunner, encoder_folder
from smoa_lab.study.runner import AnswerRunner, Runner
from smoa_lab.study.study_file import load_study

FOLDER = Path(__file__).parent
CLASSES = tuple("ABCDEFGHIJKLMNOP")
WORDS = 128
"""So many first and so many second words, each a token of its own."""
HEAD_GAIN = 2.0


class Pairs(Runner):
    """Trains and scores the same random pairs."""

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


class PairAnswers(Pairs, AnswerRunner):
    """By a language model, which answers with the letter."""


def random_pairs(count: int) -> list[Row]:
    """Names of two words, all different, each with a class drawn at random."""
    vocabulary = AutoTokenizer.from_pretrained(encoder_folder()).get_vocab()
    words = sorted(word for word in vocabulary if word.isascii() and word.isalpha() and 4 <= len(word) <= 8)
    draw = random.Random(0)
    chosen = draw.sample(words, 2 * WORDS)
    names = [f"{first} {second}" for first in chosen[:WORDS] for second in chosen[WORDS:]]
    drawn = draw.sample(names, len(names))[:count]
    return [choice_question("pairs", name, name, CLASSES, draw.randrange(len(CLASSES))) for name in drawn]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="a YAML file beside this script")
    parser.add_argument("pairs", type=int, nargs="+")
    parser.add_argument("--only", nargs="+", default=[], help="entries or budgets; default: all")
    parser.add_argument("--results", type=Path, default=FOLDER / "results")
    given = parser.parse_args()
    for count in given.pairs:
        sizes = [f"shared.data.{part}_examples={count}" for part in ("train", "validation", "test")]
        folder = given.results / f"{given.study.stem}-{count}"
        study = load_study(FOLDER / given.study, [f"folder={folder}", *sizes])
        bench = PairClasses if study.kind == "classification" else PairAnswers
        run_study(study, bench(study.shared), given.only)


if __name__ == "__main__":
    main()
