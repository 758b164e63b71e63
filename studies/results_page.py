"""Writes docs/results.md from the stored results of studies, runs and inspections, and the tables of docs/verdict.md.

    python studies/results_page.py

`smoa eval --output` and `smoa train` (its metrics.json) write docs/lab-results, `smoa inspect --json` writes
docs/inspections. Missing results are left out.
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import headroom
import stored
import verdict_tables

from smoa_lab.pages.tables import Table, score_table
from smoa_lab.study.report import EVERY_RUN, PICTURES
from smoa_lab.study.trials import PACK, TrialStore

DOCS = Path(__file__).parents[1] / "docs"
INTRODUCTION = """# Results

Written by `python studies/results_page.py` from stored JSON; do not edit.

`smoa compare` runs a study from its YAML file. Every entry gets the same search for a learning rate on validation data,
then fresh seeds on the test part.

- **Differences** are to the reference of the entry's budget, paired by seed and by question, with 95 % intervals
  (questions resampled, Student's t over seeds). *Better* and *worse* mean that the interval excludes 0, *same* that it
  includes 0. *(Holm: same)* marks what Holm's correction for all comparisons of the table takes back. Lower loss is
  better.
- **Entries** are named after their method, number of blocks (`k8`), change, and budget: `r1` means the trainable
  parameters of a LoRA of rank 1. In the studies of the scale, `spectral-lora` is SMoA as it is by default, spectral
  blocks with `scale="lora"`, and `lora` is LoRA.
- **Studies**: `refined` also searched quarter decades (a decade is a factor of 10); `float32` has its weights in that
  dtype.
- **Loss elsewhere** is the loss on text of a domain that was not trained on. A rise means forgetting.

[The verdict](verdict.md) sums up what the studies show.
"""
NOTHING = "No result is stored yet: run one of the studies in [studies](../studies), then this script.\n"
SINGLE_RUNS = (
    "Single runs of the lab, one seed each, at learning rates that were not tuned. They show what the lab reports and "
    "rank nothing. *Gold-answer loss* is the mean negative log-likelihood of the right answers. *Accuracy per "
    "character* picks the choice by the likelihood per character. *Majority* is the share of the most common label. A "
    "generated answer is right if it equals the reference; an answer without choices is right if greedy decoding would "
    "give it. BLEU runs from 0 to 100."
)
HEADROOM = (
    "Can a study of a task show a difference between methods? A small LoRA and full fine-tuning get the same search "
    "for a learning rate. A task has headroom if training moves accuracy and full fine-tuning beats LoRA, both by "
    "three standard errors (of questions and of seeds)."
)
INSPECTION = (
    "Means over the adapted layers of trained adapters. Coverage is how far down W's spectrum the energy of the update "
    "reaches: 0 for the leading direction alone, 0.5 for all directions alike."
)
RUNS = (EVERY_RUN, "Runs", "Learning rates")
"""Tables that are too long for one page of all studies."""
WIDTH = 120


def main(docs: Path = DOCS, studies: Path = stored.STUDIES) -> None:
    folders = sorted(summary.parent for summary in studies.glob("*/summary.json"))
    parts = [study(folder) for folder in folders if not folder.match("headroom-*")] + headroom_table(folders)
    parts += lab_results(sorted(docs.glob("lab-results/*.json")))
    parts += [inspection(path) for path in sorted(docs.glob("inspections/*.json"))]
    text = "\n".join([INTRODUCTION, *(parts or [NOTHING])])
    (docs / "results.md").write_text(text, encoding="utf-8")
    if (docs / "verdict.md").is_file():
        verdict_tables.write(docs / "verdict.md", studies)


def study(folder: Path) -> str:
    """One study: links to its report and runs, its tables but for that of the runs, and its pictures."""
    report, home = stored.report_of(folder), f"../studies/{folder.name}"
    files = {"README.md": "whole report", "summary.json": "summary as JSON", PACK: "every run as a line of JSON"}
    links = ", ".join(f"[{title}]({home}/{file})" for file, title in files.items() if (folder / file).is_file())
    parts = [f"## {folder.name}", f"{links}.", setting(folder), *report.introduction[1:]]
    if isinstance(report.summary, dict):
        parts += report.introduction[:1]
    else:
        parts.append(verdicts(report.summary))
    for title, content in report.sections.items():
        if isinstance(content, Table) and title not in RUNS:
            parts += [f"### {title}", content.caption, content.markdown()]
        elif (folder / PICTURES.get(title, "none")).is_file():
            parts.append(f"![{title} of the study {folder.name}]({home}/{PICTURES[title]})")
    wrapped = (part if part[0] in "#|![" else textwrap.fill(part, WIDTH) for part in parts if part)
    return "\n\n".join(wrapped) + "\n"


def headroom_table(folders: list[Path]) -> list[str]:
    """The table of all tasks on which LoRA and full fine-tuning were tuned alike."""
    tried = [folder for folder in folders if headroom.is_of_headroom(folder)]
    if not tried:
        return []
    lines = Table(headroom.HEADER, [headroom.line(folder) for folder in tried]).markdown()
    runs = ", ".join(f"[{folder.name}](../studies/{folder.name}/{PACK})" for folder in tried)
    return [f"## Headroom\n\n{textwrap.fill(HEADROOM, WIDTH)}\n\n{lines}\n\nEvery run as a line of JSON: {runs}.\n"]


def setting(folder: Path) -> str:
    """The model and data of a study, from the first of its final runs, in a sentence."""
    store = TrialStore(folder)
    run = next(map(store.find, store.names("final/")), None)
    if run is None:
        return ""
    model, data, batch = (run["config"][key] for key in ("model", "data", "training"))
    return (
        f"Model: {model['name']}, {model['dtype']}. Tasks: {', '.join(data['tasks'])}; {data['train_examples']} "
        f"training examples, {run['steps']} steps of {batch['per_device_train_batch_size']}, "
        f"{run['scores']['all']['questions']} test questions."
    )


def verdicts(rows: list[dict[str, Any]]) -> str:
    """How many entries of each budget are better, the same and worse than the reference, by loss."""
    told = []
    for budget in dict.fromkeys(row["budget"] for row in rows):
        own = [row for row in rows if row["budget"] == budget]
        words = [row["loss_difference"]["verdict"] for row in own if row["loss_difference"]]
        counts = ", ".join(f"{words.count(word)} {word}" for word in ("better", "same", "worse"))
        told.append(f"Budget {budget}, reference {own[0]['reference']}: by loss {counts}.")
    return " ".join(told)


def lab_results(files: list[Path]) -> list[str]:
    """Scores of `smoa eval --output` files and of runs' metrics: one table for all models on the same tasks."""
    groups: dict[tuple[str, str], list[tuple[Path, dict[str, Any]]]] = {}
    for path in files:
        result = json.loads(path.read_text(encoding="utf-8"))
        key = ", ".join(result["config"]["data"]["tasks"]), result.get("protocol", "likelihood")
        groups.setdefault(key, []).append((path, result))
    tables = [lab_table(*key, results) for key, results in groups.items()]
    return [f"## Single runs\n\n{textwrap.fill(SINGLE_RUNS, WIDTH)}\n", *tables] if tables else []


def lab_table(tasks: str, protocol: str, results: list[tuple[Path, dict[str, Any]]]) -> str:
    """Table of the untouched model and each method, task by task, and how each was trained."""
    models = {model: by_task for _, result in results for model, by_task in stages(result).items()}
    scores = {
        model: {task: own for task, own in models[model].items() if task != "all" or len(models[model]) > 2}
        for model in sorted(models, key=lambda model: (model != "untouched", model))
    }
    table = score_table(scores)
    lines = Table(["task", "model", *table.header[2:]], table.rows).markdown()
    return f"### {tasks}: {protocol}\n\n{lines}\n\n{''.join(origin(*each) for each in results)}"


def inspection(path: Path) -> str:
    """Table of means over the layers of each adapter that `smoa inspect` reported on."""
    digits = {"relative_update": 3, "rank": 0, "effective_rank": 0, "coverage": 3}
    rows = []
    for place, layers in json.loads(path.read_text(encoding="utf-8")).items():
        means = [f"{sum(layer[name] for layer in layers) / len(layers):.{count}f}" for name, count in digits.items()]
        trained = sum(layer["parameters"] for layer in layers)
        rows.append([Path(place).name, f"{trained:,}", *means])
    header = ["adapter", "trained", "‖ΔW‖/‖W‖", "rank of ΔW", "effective rank", "coverage"]
    told = f"{textwrap.fill(INSPECTION, WIDTH)}\n\n{Table(header, rows).markdown()}\n\n[JSON](inspections/{path.name})"
    return f"## {path.stem}: the spectrum\n\n{told}\n"


def stages(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Scores of each model in a file, by task; the model before training is the untouched one."""
    method = str(result["config"]["method"])
    if "evaluation" in result:
        return {{"before": "untouched"}.get(stage, method): scores for stage, scores in result["evaluation"].items()}
    return {method if result.get("adapter") else "untouched": result["scores"]}


def origin(path: Path, result: dict[str, Any]) -> str:
    """A line on what was run, with a link to its JSON."""
    config, link = result["config"], f"[{path.stem}](lab-results/{path.name})"
    if "training" not in result:
        return f"- {link}: {config['method'] if result.get('adapter') else 'untouched'}\n"
    training = config["training"]
    return (
        f"- {link}: {config['method']}, {result['parameters']['trainable']:,} parameters, {config['model']['dtype']}, "
        f"{result['training']['steps']} steps of {training.get('per_device_train_batch_size', 8)}, learning rate "
        f"{training['learning_rate']:g}, seed {training.get('seed', 42)}\n"
    )


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
