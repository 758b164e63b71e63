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
from smoa_lab.study.trials import PACK, TrialStore

DOCS = Path(__file__).parents[1] / "docs"
INTRODUCTION = """# Results

Written by `python studies/results_page.py` from stored JSON; do not edit.

Each study leads to its report: tables, pictures, and every run. Every entry got the same search for a learning rate on
validation data, then fresh seeds on the test part. [The verdict](verdict.md) sums up what the studies show.

The last column counts entries against the reference of their budget (`r1` means the trainable parameters of a LoRA of
rank 1) by the test loss, or by what was recalled, paired by seed and question. *Same* means that the 95 % interval
includes 0, or that Holm's correction for all comparisons of the budget takes the difference back.
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
WIDTH = 120
HEADER = ["study", "model", "tasks", "entries", "better, same or worse"]
RECALLED = {"random pairs", "phone book"}
VERDICTS = ("better", "same", "worse", "one seed")


def main(docs: Path = DOCS, studies: Path = stored.STUDIES) -> None:
    folders = sorted(summary.parent for summary in studies.glob("*/summary.json"))
    parts = [Table(HEADER, list(map(line, folders))).markdown(["---"] * len(HEADER)) + "\n"] if folders else []
    parts += headroom_table(folders)
    parts += lab_results(sorted(docs.glob("lab-results/*.json")))
    parts += [inspection(path) for path in sorted(docs.glob("inspections/*.json"))]
    text = "\n".join([INTRODUCTION, *(parts or [NOTHING])])
    (docs / "results.md").write_text(text, encoding="utf-8")
    if (docs / "verdict.md").is_file():
        verdict_tables.write(docs / "verdict.md", studies)


def line(folder: Path) -> list[str]:
    """A study: a link to its report, what it trained, from the first of its final runs, and what came out."""
    store, summary = TrialStore(folder), json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    run = store.find(store.names("final/")[0]) or {}
    model, data, batch = (run["config"][key] for key in ("model", "data", "training"))
    is_sequence = isinstance(summary, dict)
    entries = {row["entry"] for row in (summary["runs"] if is_sequence else summary)}
    return [
        f"[{folder.name}](../studies/{folder.name}/README.md)",
        f"{model['name']}, {model['dtype']}",
        f"{', '.join(data['tasks'])}: {data['train_examples']} examples, {run['steps']} steps of "
        f"{batch['per_device_train_batch_size']}, {run['scores']['all']['questions']} questions",
        f"{len(entries)}",
        "–" if is_sequence else verdicts(summary, "accuracy" if set(data["tasks"]) & RECALLED else "loss"),
    ]


def headroom_table(folders: list[Path]) -> list[str]:
    """The table of all tasks on which LoRA and full fine-tuning were tuned alike."""
    tried = [folder for folder in folders if headroom.is_of_headroom(folder)]
    if not tried:
        return []
    lines = Table(headroom.HEADER, [headroom.line(folder) for folder in tried]).markdown()
    runs = ", ".join(f"[{folder.name}](../studies/{folder.name}/{PACK})" for folder in tried)
    return [f"## Headroom\n\n{textwrap.fill(HEADROOM, WIDTH)}\n\n{lines}\n\nEvery run as a line of JSON: {runs}.\n"]


def verdicts(rows: list[dict[str, Any]], measure: str) -> str:
    """How many entries of each budget are better, the same and worse than the reference, after Holm's correction."""
    told = []
    for budget in dict.fromkeys(row["budget"] for row in rows):
        own = [row for row in rows if row["budget"] == budget]
        found = [each for row in own if (each := row[f"{measure}_difference"])]
        words = [each["holm_verdict"] or each["verdict"] for each in found]
        counts = ", ".join(f"{count} {word}" for word in VERDICTS if (count := words.count(word)))
        told += [f"{budget}, to {own[0]['reference']}: {counts}"] if counts else []
    return "; ".join(told)


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
