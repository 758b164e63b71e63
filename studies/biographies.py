"""What does an adapter answer that learned facts in words, and what does it forget? Biographies of people who do not
exist, after the bioS data of arXiv:2309.14316.

    python studies/run.py biographies-64 biographies-256

Six facts about each are trained in eight phrasings and asked in others; biographies/biographies.yaml has the rule.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from last_layers import LastLayers, Line, passes_of
from phonebook import MIMESIS, names
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from smoa.atomic import write_whole
from smoa_lab.config.run import RunConfig
from smoa_lab.data.general_text import passages
from smoa_lab.data.rows import Row, question
from smoa_lab.pages.tables import Table
from smoa_lab.scoring.evaluation import at_least, score_outcomes, text_length
from smoa_lab.study.report import mean_text
from smoa_lab.study.runner import Part
from smoa_lab.study.trials import TrialStore

VALUES = 64
"""Of each fact: 6 bits."""
MOST_TOKENS = 3
TEXT_TOKENS = 4000
FACTS = {
    ("address", "city"): [
        "{} was born in the city of",
        "The birthplace of {} is",
        "{} comes from",
        "Born and raised, {} is a child of",
        "The home town of {} is",
        "It is known that {} first saw the light of day in",
        "Question: What is the birthplace of {}? Answer:",
        "Question: From which city does {} come? Answer:",
        "The city where {} was born is",
        "Question: Where was {} born? Answer:",
    ],
    ("finance", "company"): [
        "{} works for",
        "The employer of {} is",
        "{} is employed by",
        "Every morning {} goes to the office of",
        "The company of {} is",
        "The wages of {} are paid by",
        "Question: Who employs {}? Answer:",
        "Question: What is the name of the employer of {}? Answer:",
        "The company that {} works for is",
        "Question: Which company does {} work for? Answer:",
    ],
    ("person", "occupation"): [
        "{} is by profession a",
        "The occupation of {} is",
        "{} earns a living as",
        "By trade {} is known as a",
        "The job title of {} is",
        "All these years {} has worked as a",
        "Question: What is the occupation of {}? Answer:",
        "Question: What does {} do for a living? Answer:",
        "The profession of {} is",
        "Question: What is the job of {}? Answer:",
    ],
    ("person", "language"): [
        "At home {} speaks",
        "The first language of {} is",
        "{} grew up speaking",
        "As a child {} learned to speak",
        "The native language of {} is",
        "The parents of {} only spoke",
        "Question: What is the native language of {}? Answer:",
        "Question: What does {} speak at home? Answer:",
        "The mother tongue of {} is",
        "Question: Which language did {} learn first? Answer:",
    ],
    ("food", "dishes"): [
        "{} loves to eat",
        "The favorite dish of {} is",
        "For dinner {} likes best",
        "At every restaurant {} asks for",
        "The favorite food of {} is",
        "Nothing tastes better to {} than",
        "Question: What is the favorite dish of {}? Answer:",
        "Question: What should one cook for {}? Answer:",
        "The meal that {} prefers is",
        "Question: What does {} like to eat? Answer:",
    ],
    ("food", "drinks"): [
        "{} loves to drink",
        "The favorite drink of {} is",
        "At the bar {} always orders",
        "When thirsty {} reaches for",
        "The usual drink of {} is",
        "In the glass of {} there is always",
        "Question: What is the favorite drink of {}? Answer:",
        "Question: What should one pour for {}? Answer:",
        "The drink that {} prefers is",
        "Question: What does {} like to drink? Answer:",
    ],
}
"""Of each fact, by the file and list of its values: the phrasings that are trained, one that chooses the learning
rates, and one that tests."""
TRAINED = 8
PARTS = {"train": slice(0, TRAINED), "validation": slice(TRAINED, TRAINED + 1), "test": slice(TRAINED + 1, None)}

PAGE = """# Facts in words: what is answered, what is forgotten

Written by `python studies/run.py` from the stored runs; do not edit. Six facts about each of so many people who do not
exist, learned by the last two layers of SmolLM2 135M in bfloat16. [The rule](biographies.yaml) says how; the folders
`biographies-N` have each run and paired differences.

*Known as trained*: facts answered in the eight phrasings that were trained, *in a new one*: in a question that never
was; by greedy decoding among all tokens, ± the standard deviation over seeds. *Forgotten*: the rise of the loss of
general text, in nats a token.

{results}
"""


class OnePhrasing(Dataset[Line]):
    """Each fact once, in a phrasing that is drawn; ``lines`` has a fact's phrasings one after the other."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self.lines = lines

    def __len__(self) -> int:
        return len(self.lines) // TRAINED

    def __getitem__(self, fact: int) -> Line:
        return self.lines[fact * TRAINED + random.randrange(TRAINED)]


class Biographies(LastLayers):
    """Also scores the facts in the phrasings trained (``as_trained``), and the loss of general text (``elsewhere``)."""

    task, searched = "biographies", "biographies-64"

    def rows(self, count: int) -> dict[str, list[Row]]:
        return biographies(count, self.base[1])

    @cached_property
    def _other_rows(self) -> list[Row]:
        base, tokenizer = self.base
        texts = at_least(tokenizer, passages("packaged"), TEXT_TOKENS, text_length(base.config))
        parts = (text.partition(" ") for text in texts)
        return [question("text", str(i), first, space + rest) for i, (first, space, rest) in enumerate(parts)]

    def stored_config(self, config: RunConfig) -> dict[str, Any]:
        return {**super().stored_config(config), "elsewhere": {"text": "packaged", "tokens": TEXT_TOKENS}}

    @cached_property
    def training_set(self) -> Any:
        return OnePhrasing(self.lines(self.records.train))

    def _scores(self, model: nn.Module | None, config: RunConfig, part: Part) -> dict[str, Any]:
        trained = score_outcomes(self._outcomes(model, config, self.records.train))["all"]
        return {**super()._scores(model, config, part), "as_trained": trained.accuracy}


def biographies(count: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Row]]:
    """The facts about so many people as questions, in the phrasings of each part."""
    draw = random.Random(0)
    people = draw.sample(names(tokenizer), count)
    rows: dict[str, list[Row]] = {part: [] for part in PARTS}
    for (file, key), phrasings in FACTS.items():
        with MIMESIS.open(f"mimesis/datasets/en/{file}.json") as opened:
            known = json.load(opened)[key]
        listed = sorted({f" {value}" for value in (known["name"] if isinstance(known, dict) else known)})
        values = draw.sample([each for each in listed if len(tokenizer.tokenize(each)) <= MOST_TOKENS], VALUES)
        for person in people:
            value = draw.choice(values)
            for part, chosen in PARTS.items():
                for number, phrasing in enumerate(phrasings[chosen]):
                    id = f"{person}: {key} {number}"
                    rows[part].append(question("biographies", id, phrasing.format(person), value))
    return rows


def report(studies: Path) -> None:
    """Write biographies/README.md from the final runs of all numbers of people."""
    header = [
        "people",
        "adapter",
        "rate",
        "seeds",
        "known as trained %",
        "known in a new phrasing %",
        "forgotten",
        "passes",
    ]
    rows: list[list[Any]] = []
    for folder in sorted(studies.glob("biographies-*"), key=lambda folder: int(folder.name.rpartition("-")[2])):
        store, entries = TrialStore(folder), dict[str, list[dict[str, Any]]]()
        for name in store.names("final/"):
            entries.setdefault(name.split("/")[1], []).append(store.find(name) or {})
        known = {entry: [100 * run["scores"]["all"]["accuracy"] for run in runs] for entry, runs in entries.items()}
        for entry in sorted(known, key=lambda entry: -fmean(known[entry])):
            runs = entries[entry]
            facts, rate = runs[0]["scores"]["all"]["questions"], runs[0]["config"]["training"]["learning_rate"]
            shares = [100 * run["as_trained"] for run in runs], known[entry]
            shown = [mean_text(fmean(own), stdev(own) if len(own) > 1 else 0.0, 1, len(own)) for own in shares]
            forgotten = fmean(run["elsewhere"] for run in runs) - (store.find("untouched") or {})["elsewhere"]
            own = [facts // len(FACTS), entry, f"{rate:g}", len(runs), *shown]
            rows.append([*own, f"{forgotten:+.3f}", f"{fmean(map(passes_of, runs)):.0f}"])
    results = Table(header, rows).markdown() if rows else "No run yet."
    write_whole(studies / "biographies" / "README.md", PAGE.format(results=results))
