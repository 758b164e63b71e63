"""How many random numbers does an adapter hold? A phone book, after arXiv:2603.01097 and arXiv:2605.30260.

    python studies/run.py phonebook-128 phonebook-512 --only r1

`First Last:` leads to ten digits drawn at random: 33.2 bits that nothing but the adapter can hold. There is one study
for each number of entries; phonebook/phonebook.yaml has the rule. The adapters are on the last two layers, so what
reaches these is computed once and an ordinary model of two layers is trained, with logits of the digits and the end.
"""

from __future__ import annotations

import copy
import json
import math
import random
import time
from collections.abc import Sequence
from functools import cached_property
from itertools import cycle, product
from pathlib import Path
from typing import Any

import altair as alt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from smoa.atomic import write_whole
from smoa.errors import ConfigError
from smoa_lab.base_models import load_base_model
from smoa_lab.config.run import ModelSection, RunConfig
from smoa_lab.data.rows import Row, content_hash, question
from smoa_lab.data.sources import Wheel
from smoa_lab.data.tasks import Selection
from smoa_lab.pages.charts import DASHES, MUTED, color_of, lines, save_picture, values
from smoa_lab.pages.tables import Table
from smoa_lab.scoring.evaluation import Outcome
from smoa_lab.scoring.losses import scoring
from smoa_lab.study.comparison import Comparison
from smoa_lab.study.runner import Runner
from smoa_lab.study.study import Study
from smoa_lab.study.trials import TrialStore
from smoa_lab.training.adapting import with_adapter
from smoa_lab.training.loaded_run import REPLACED, checked_arguments

NAMES = Wheel("mimesis", "22.2.0", "4 MB")
DIGITS = 10
BITS = DIGITS * math.log2(10)
"""Of an entry: 33.2."""
LAYERS = 2
STOP = {"passes": 10, "fall": 0.01, "known": 0.02, "down": 10}
"""When the loss of a pass, in nats a token, has not fallen by the share ``fall`` in so many ``passes``, or is below
``known``, the learning rate falls to 0 over ``down`` more passes."""
BATCH = 256
SEARCHED = "phonebook-256"
CEILING = (256, 512)
"""The numbers of names with three seeds."""
HUNDRED_KB = 25_000
"""Parameters of an adapter of 100 kB, in float32 as it is saved."""
WHOLE_MODELS = {"2 (Allen-Zhu and Li)": 2.0, "3.6 (Morris et al.)": 3.6}
"""Bits a parameter."""
SHOWN = """![Bits stored a parameter, and numbers recalled, against the number of names, by method.](capacity.png)

"""
PAGE = """# How many random numbers does an adapter hold?

Written by `python studies/run.py` from the stored runs; do not edit. `First Last:` leads to ten digits drawn at random,
33.2 bits, on the last two layers of SmolLM2 135M in bfloat16. [The rule](phonebook.yaml) says how; the folders
`phonebook-N` have each run and paired differences.

*Bits a parameter*: N · 33.2 − the loss of the digits in bits, over the trained parameters. *Recalled*: numbers that
greedy decoding among the ten digits and the end gives whole. *At limit*: runs that took all passes allowed, so
that their adapter could hold more.

{results}

{shown}Numbers that an adapter of 100 kB (25,000 parameters in float32) would hold, from the most that each
recalled whole: {held}.

## The search of a learning rate

Seed 100.

{search}
"""


class PhoneBook(Runner):
    """Trains and scores the same entries, by the last layers alone."""

    @cached_property
    def base(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return load_base_model(ModelSection.model_validate(self.shared["model"]))

    @cached_property
    def records(self) -> Selection:
        rows = phone_book(int(self.shared["data"]["train_examples"]), self.base[1])
        used = {"examples": len(rows), "sha256": content_hash(rows)}
        account = {"tasks": {}, "used": dict.fromkeys(("train", "validation", "test"), used)}
        return Selection(rows, rows, rows, {"phone book": "text"}, account)

    @cached_property
    def lines(self) -> Lines:
        return Lines(*self.base, self.records.train)

    def stored_config(self, config: RunConfig) -> dict[str, Any]:
        stored = super().stored_config(config)
        return {**stored, "data": {**stored["data"], "tasks": ["phone book"]}, "stop": STOP}

    def _fit(self, config: RunConfig, checkpoint: str | None, check: TrainerCallback) -> tuple[Any, Any, float]:
        arguments = checked_arguments(TrainingArguments(**config.training))
        set_seed(arguments.seed)
        model = with_adapter(copy.deepcopy(self.lines.top), self.base[1], config.method, config.adapter)
        rows = [
            {"inputs_embeds": hidden, "labels": answer}
            for hidden, answer in zip(self.lines.hidden, self.lines.answers, strict=True)
        ]
        steps = math.ceil(len(rows) / arguments.per_device_train_batch_size)
        plateau = Plateau(int(arguments.warmup_steps), steps, int(arguments.num_train_epochs))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, arguments.learning_rate, weight_decay=0)
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            compute_loss_func=lambda outputs, labels, **_: losses(outputs.logits, labels).mean(),
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, plateau.factor)),
            callbacks=[check, plateau],
        )
        for callback in REPLACED:
            trainer.remove_callback(callback)
        started = time.process_time()  # these machines are shared
        trainer.train(resume_from_checkpoint=checkpoint)
        return model, trainer, time.process_time() - started

    def _outcomes(self, model: nn.Module | None, config: RunConfig, rows: Sequence[Row]) -> list[Outcome]:
        scored: Any = self.lines.top if model is None else model
        with scoring(scored):
            parts = [scored(inputs_embeds=part).logits for part in self.lines.hidden.split(BATCH)]
        logits, answers = torch.cat(parts), self.lines.answers
        nll = losses(logits, answers)[:, :DIGITS].sum(1).tolist()
        right = (logits[:, -answers.shape[1] :].argmax(-1) == answers).all(1).tolist()
        return [Outcome(row, loss, DIGITS, hit, hit) for row, loss, hit in zip(rows, nll, right, strict=True)]


class Lines:
    """The entries as the last layers see them: ``hidden`` (rows, tokens, width) comes in; ``answers`` (rows, 11), the
    digits and the end as numbers of the logits that ``top`` has, should come out at the last tokens."""

    def __init__(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> None:
        texts = [f"{row.prompt}{row.completion}" for row in rows]
        tokens = torch.tensor(tokenizer(texts, add_special_tokens=False)["input_ids"])
        digits = [*map(tokenizer.convert_tokens_to_ids, "0123456789"), tokenizer.eos_token_id]
        numbers = [[*map(int, str(row.completion)), DIGITS] for row in rows]
        self.answers = torch.tensor(numbers)
        self.hidden = torch.cat([hidden_below(base, LAYERS, part) for part in tokens.split(BATCH)])
        self.top = top_of(base, LAYERS, digits)


def losses(logits: Tensor, answers: Tensor) -> Tensor:
    """The negative log-likelihood in nats of each answer (rows, 11), which the last tokens predict."""
    return F.cross_entropy(logits[:, -answers.shape[1] :].float().mT, answers, reduction="none")


class Plateau(TrainerCallback):
    """The learning rate by ``STOP``: warm-up, constant while the loss falls, then down to 0, where training ends."""

    def __init__(self, warmup: int, steps: int, passes: int) -> None:
        """``steps`` are of a pass, and ``passes`` the most of all."""
        self.warmup, self.steps = warmup, steps
        self.last = passes * steps

    def factor(self, step: int) -> float:
        """Of the learning rate, at a step."""
        down = STOP["down"] * self.steps
        return max(0.0, min(1.0, (step + 1) / self.warmup, (self.last - step) / down))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Called by the Trainer, which logs the mean loss of each pass."""
        passes = [each["loss"] for each in state.log_history if "loss" in each]
        before = passes[: -int(STOP["passes"])]
        is_flat = bool(before) and min(passes) > (1 - STOP["fall"]) * min(before)
        if is_flat or min(passes) < STOP["known"]:
            self.last = min(self.last, state.global_step + int(STOP["down"]) * self.steps)
        control.should_training_stop |= state.global_step >= self.last


def phone_book(count: int, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """Names of a first and a last name, all different and each a token of its own, with numbers drawn at random."""
    with NAMES.open("mimesis/datasets/en/person.json") as file:
        known = json.load(file)
    first = sorted({name for names in known["names"].values() for name in names})
    last = sorted({f" {name}" for name in known["surnames"]})
    short = [[name for name in part if len(tokenizer.tokenize(name)) == 1] for part in (first, last)]
    names = ["".join(both) for both in product(*short)]
    draw = random.Random(0)
    return [
        question("phone book", name, f"{name}:", "".join(draw.choices("0123456789", k=DIGITS)))
        for name in draw.sample(names, len(names))[:count]
    ]


def top_of(base: Any, layers: int, tokens: Sequence[int]) -> Any:
    """The last layers of a model of Llama's kind as a model: hidden states in (``inputs_embeds``), logits of ``tokens``
    out."""
    config = copy.deepcopy(base.config)  # by from_dict it would lose the kind of attention
    config.update({"num_hidden_layers": layers, "vocab_size": len(tokens), "tie_word_embeddings": False})
    config.update({"use_cache": False})  # the layers have their places in the base
    with torch.device("meta"):
        top = type(base)(config)
    top.model.layers, top.model.norm = base.model.layers[-layers:], base.model.norm
    top.model.rotary_emb = base.model.rotary_emb
    rows = base.get_output_embeddings().weight[list(tokens)].detach().clone()
    top.lm_head.weight = nn.Parameter(rows, requires_grad=False)
    top.model.embed_tokens = nn.Embedding(1, config.hidden_size)  # not asked, and not to be on the meta device
    return top


@torch.no_grad()
def hidden_below(base: PreTrainedModel, layers: int, tokens: Tensor) -> Tensor:
    """What reaches the last layers: (rows, tokens, width)."""
    hidden: Tensor = base(input_ids=tokens, output_hidden_states=True, logits_to_keep=1).hidden_states[-layers - 1]
    return hidden


def sizes(count: int) -> list[str]:
    """The changes to a study's file for so many entries."""
    parts = [f"shared.data.{part}_examples={count}" for part in ("train", "validation", "test")]
    return [*parts, f"seeds={[0, 1, 2] if count in CEILING else [0]}"]


def at_searched_rates(study: Study, searched: Comparison) -> Study:
    """The study without a search: the entries whose search is over in another study, at the rates found there.

    Raises:
        ConfigError: there is none.
    """
    done = [name for name in study.entries if searched.stored_search(name) and not searched.search(name)]
    if not done:
        raise ConfigError(f"{study.folder.name}: no learning rate is known; run {searched.study.folder.name} first")
    rates = {name: searched.tuned(name).learning_rate for name in done}
    entries = {name: study.entries[name].model_copy(update={"learning_rate": rates[name]}) for name in done}
    references = [name for name in study.references if name in entries]
    tuning = study.tuning.model_copy(update={"max_runs": 0})
    return study.model_copy(update={"entries": entries, "references": references, "tuning": tuning})


def report(studies: Path) -> None:
    """Write phonebook/README.md, and its picture, from the runs of all numbers of names."""
    runs, folder = measured(studies), studies / "phonebook"
    finals = means([run for run in runs if run["stage"] == "final"])
    search = means([run for run in runs if run["stage"] == "tuning"])
    held = {row["entry"]: max(each["held"] for each in finals if each["entry"] == row["entry"]) for row in finals}
    most = ", ".join(f"{name} {held[name]:,.0f}" for name in sorted(held, key=lambda name: -held[name]))
    drawn = [row for row in finals if not row["entry"].endswith("-r2")]
    if has_picture := len({row["names"] for row in drawn}) > 1:
        save_picture(picture(drawn), folder / "capacity.png")
    parts = {"results": table(finals), "shown": SHOWN if has_picture else "", "held": most or "not known yet"}
    write_whole(folder / "README.md", PAGE.format(**parts, search=table(search)))


def measured(studies: Path) -> list[dict[str, Any]]:
    """Of each run the bits stored a parameter, the numbers recalled and the passes taken; ``held`` is what as many
    parameters as ``HUNDRED_KB`` would recall."""
    runs = []
    for folder in studies.glob("phonebook-*"):
        store = TrialStore(folder)
        for name in (name for name in store.names() if "/" in name):
            run, (stage, entry, _) = store.find(name) or {}, name.split("/")
            training, scores = run["config"]["training"], run["scores"]["all"]
            names, share, parameters = scores["questions"], scores["accuracy"], run["parameters"]
            loss = math.inf if scores["gold_loss"] is None else scores["gold_loss"] * DIGITS / math.log(2)
            passes = run["steps"] / math.ceil(names / training["per_device_train_batch_size"])
            runs.append(
                {
                    "stage": stage,
                    "entry": entry,
                    "method": run["config"]["method"],
                    "rate": training["learning_rate"],
                    "names": names,
                    "parameters": parameters,
                    "bits": names * (BITS - loss) / parameters,
                    "recalled": 100 * share,
                    "held": names * share / parameters * HUNDRED_KB,
                    "passes": passes,
                    "limit": passes >= training["num_train_epochs"],
                }
            )
    return runs


def means(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs of each adapter, number of names and rate as one row, the best first."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["names"], run["entry"], run["rate"]), []).append(run)
    rows = [
        {
            **own[0],
            **{key: sum(run[key] for run in own) / len(own) for key in ("bits", "recalled", "held", "passes")},
            "seeds": len(own),
            "limit": sum(run["limit"] for run in own),
        }
        for own in groups.values()
    ]
    return sorted(rows, key=lambda row: (row["names"], -row["bits"]))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    header = ["adapter", "parameters", "names", "rate", "seeds", "bits a parameter", "recalled %", "passes", "at limit"]
    cells = [
        [
            *(row["entry"], f"{row['parameters']:,}", f"{row['names']:,}", f"{row['rate']:g}", row["seeds"]),
            *(f"{row['bits']:.3f}", f"{row['recalled']:.1f}", f"{row['passes']:.0f}", row["limit"]),
        ]
        for row in rows
    ]
    return Table(header, cells).markdown() if rows else "No run yet."


def picture(rows: list[dict[str, Any]]) -> Any:
    """Bits stored and numbers recalled against the number of names, with what is known of whole models."""
    methods = {row["entry"]: row["method"] for row in rows}
    looks = {name: (color_of(method), dash) for (name, method), dash in zip(methods.items(), cycle(DASHES))}
    shown = [{**row, "name": row["entry"]} for row in rows]
    ticks = alt.Axis(values=sorted({row["names"] for row in rows}), format=",", title="names to learn")
    x = alt.X("names:Q", axis=ticks, scale=alt.Scale(type="log", nice=False))
    bits = alt.Y("bits:Q", title="bits stored a parameter", scale=alt.Scale(type="log", domain=[0.1, 5], nice=False))
    recalled = alt.Y("recalled:Q", title="numbers recalled (%)", scale=alt.Scale(domain=[0, 100]))
    known = alt.Chart(values([{"bits": bits, "text": text} for text, bits in WHOLE_MODELS.items()])).encode(y="bits:Q")
    marks = known.mark_rule(color=MUTED) + known.mark_text(align="left", dx=4, dy=-6).encode(
        x=alt.value(0), text="text:N"
    )
    return alt.hconcat(marks + lines(shown, looks, x, bits), lines(shown, looks, x, recalled))
