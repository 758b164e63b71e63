"""Writes docs/results.md from the stored results of studies, runs and inspections.

    python docs/figures/results.py

`smoa compare` writes docs/studies; `smoa eval --output` and `smoa train` (its metrics.json) write docs/lab-results;
`smoa inspect --json` writes docs/inspections; two scripts in benchmarks/ run studies too. Missing results are left out.
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

from smoa_lab.drawing.markdown_tables import markdown_table
from smoa_lab.study.packing import PACK
from smoa_lab.study.report.results.headroom import HEADROOM_HEADER, headroom_line, is_of_headroom
from smoa_lab.study.report.results.rows import untouched_sentence
from smoa_lab.study.report.results.statistics import Difference
from smoa_lab.study.report.sequence import sequence_tables as sequences
from smoa_lab.study.trials import TrialStore

DOCS = Path(__file__).parents[1]
INTRODUCTION = """# Results

Written by `python docs/figures/results.py` from stored JSON; do not edit.

`smoa compare` runs a study from its YAML file. Every entry gets the same search for a learning rate on validation data,
then fresh seeds on the test part.

- **Differences** are to the reference of the entry's budget, paired by seed and by question, with 95 % intervals
  (questions resampled, Student's t over seeds). *Better* and *worse* mean that the interval excludes 0, *same* that it
  includes 0. *(Holm: same)* marks what Holm's correction for all comparisons of the table takes back. Lower loss is
  better.
- **Entries** are named after their method, number of blocks (`k8`), change, and budget: `r1` means the trainable
  parameters of a LoRA of rank 1. In the studies of the scale, `spectral-lora` is SMoA as it is by default, spectral
  blocks with `scale="lora"`, and `lora` is LoRA.
- **Studies**: `refined` also searched quarter decades; `float32` has its weights in that dtype.
- **Loss elsewhere** is the loss on text of a domain that was not trained on. A rise means forgetting.

[Limits](limits.md#of-the-evidence) sums up what the studies show.
"""
NOTHING = (
    "No result is stored yet: run one of the studies in [configs/studies](../configs/studies), then this script.\n"
)
SINGLE_RUNS = (
    "Single runs of the lab, one seed each, at learning rates that were not tuned. They show what the lab reports and "
    "rank nothing. *Gold loss* is the mean negative log-likelihood of the right answers. *Accuracy norm* picks the "
    "choice by the likelihood per character. *Majority* is the share of the most common label. A generated answer is "
    "right if it equals the reference; an answer without choices is right if greedy decoding would give it. BLEU runs "
    "from 0 to 100."
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
HEADER = ["entry", "trained", "seeds", "loss", "loss − reference", "", "accuracy %", "accuracy % − reference", ""]
ELSEWHERE = "loss elsewhere"
WIDTH = 120


def main(docs: Path = DOCS, benchmarks: Path = DOCS.parent / "benchmarks" / "results") -> None:
    studied = sorted(path for path in docs.glob("studies/*/summary.json") if not path.parent.match("headroom-*"))
    studied += sorted(benchmarks.glob("*/summary.json"))
    parts = [study(path) for path in studied] + headroom(sorted(docs.glob("studies/*")))
    parts += lab_results(sorted(docs.glob("lab-results/*.json")))
    parts += [inspection(path) for path in sorted(docs.glob("inspections/*.json"))]
    text = "\n".join([INTRODUCTION, *(parts or [NOTHING])])
    (docs / "results.md").write_text(text, encoding="utf-8")


def study(summary: Path) -> str:
    """One study: its tables and, if it is in the documents, links to its report and runs, and its pictures."""
    folder, found = summary.parent, json.loads(summary.read_text(encoding="utf-8"))
    tables = sequence_tables(found) if isinstance(found, dict) else budget_tables(folder, found)
    if folder.parent.name != "studies":
        told = f"## {folder.name}\n\nThe report and every run: `benchmarks/results/{folder.name}`.{setting(folder)}"
        return "\n\n".join([told, *tables]) + "\n"
    home = f"studies/{folder.name}"
    links = [f"[summary as JSON]({home}/summary.json)"]
    if (folder / "README.md").is_file():
        links.insert(0, f"[whole report]({home}/README.md)")
    if (folder / PACK).is_file():
        links.append(f"[every run as a line of JSON]({home}/{PACK})")
    parts = [f"## {folder.name}\n\n{', '.join(links)}.{setting(folder)}"]
    parts += tables
    pictures = {path.name: path.stem.replace("_", " ").capitalize() for path in sorted(folder.glob("*.png"))}
    parts += [f"![{title} of the study {folder.name}]({home}/{name})" for name, title in pictures.items()]
    return "\n\n".join(parts) + "\n"


def sequence_tables(found: dict[str, Any]) -> list[str]:
    """Of a study of kind sequence: all tables but that of its runs."""
    told = filter(None, (sequences.INTRODUCTION, sequences.before_sentence(found["before"])))
    return [
        textwrap.fill(" ".join(told), WIDTH),
        *(
            f"### {one.title}\n\n{textwrap.fill(one.text, WIDTH)}\n\n{markdown_table(one.header, one.lines)}"
            for one in sequences.table_sections(found)
        ),
    ]


def budget_tables(folder: Path, rows: list[dict[str, Any]]) -> list[str]:
    """Of any other study: a table for each budget, and the untouched model."""
    parts = []
    for budget in dict.fromkeys(row["budget"] for row in rows):
        of_budget = sorted(
            (row for row in rows if row["budget"] == budget), key=lambda row: (row["loss"] is None, row["loss"])
        )
        parts.append(f"Budget *{budget}*, reference **{of_budget[0]['reference']}**; {verdicts(of_budget)}")
        forgets = any(row["elsewhere"] is not None for row in of_budget)
        header = [*HEADER, ELSEWHERE] if forgets else HEADER
        parts.append(table(header, [cells(row)[: len(header)] for row in of_budget]))
    note = untouched_sentence(TrialStore(folder).find("untouched"))
    if note:
        parts.append(textwrap.fill(note, WIDTH))
    return parts


def headroom(folders: list[Path]) -> list[str]:
    """The table of all tasks on which LoRA and full fine-tuning were tuned alike."""
    tried = [folder for folder in folders if is_of_headroom(folder)]
    if not tried:
        return []
    lines = markdown_table(HEADROOM_HEADER, map(headroom_line, tried))
    runs = ", ".join(f"[{folder.name}](studies/{folder.name}/{PACK})" for folder in tried)
    return [f"## Headroom\n\n{textwrap.fill(HEADROOM, WIDTH)}\n\n{lines}\n\nEvery run as a line of JSON: {runs}.\n"]


def setting(folder: Path) -> str:
    """The model and data of a study, from the first of its final runs, in a sentence."""
    store = TrialStore(folder)
    run = next(map(store.find, store.names("final/")), None)
    if run is None:
        return ""
    model, data, batch = (run["config"][key] for key in ("model", "data", "training"))
    told = (
        f"Model: {model['name']}, {model['dtype']}. Tasks: {', '.join(data['tasks'])}; {data['train_examples']} "
        f"training examples, {run['steps']} steps of {batch['per_device_train_batch_size']}, "
        f"{run['scores']['all']['questions']} test questions."
    )
    return f"\n\n{textwrap.fill(told, WIDTH)}"


def verdicts(rows: list[dict[str, Any]]) -> str:
    """How many entries are better, the same and worse than the reference, by loss."""
    found = [row["loss_difference"]["verdict"] for row in rows if row["loss_difference"]]
    return "by loss " + ", ".join(f"{found.count(word)} {word}" for word in ("better", "same", "worse")) + "."


def cells(row: dict[str, Any]) -> list[str]:
    return [
        row["entry"],
        f"{row['parameters']:,}",
        str(len(row["seeds"])),
        "diverged" if row["loss"] is None else f"{row['loss']:.4f} ± {row['loss_spread']:.4f}",
        *difference(row["loss_difference"], 1, 4),
        f"{100 * row['accuracy']:.1f} ± {100 * row['accuracy_spread']:.1f}",
        *difference(row["accuracy_difference"], 100, 1),
        "–" if row["elsewhere"] is None else f"{row['elsewhere']:.3f}",
    ]


def difference(found: dict[str, Any] | None, scale: float, digits: int) -> tuple[str, str]:
    if found is None:
        return "", "–"
    if found["mean"] is None:
        return "diverged", found["verdict"]
    known = Difference(**found)
    return " ".join(known.signed(scale, digits)), known.told


def lab_results(files: list[Path]) -> list[str]:
    """Scores of `smoa eval --output` files and of runs' metrics: one table for all models on the same tasks."""
    groups: dict[tuple[str, str], list[tuple[Path, dict[str, Any]]]] = {}
    for path in files:
        result = json.loads(path.read_text(encoding="utf-8"))
        key = ", ".join(result["config"]["data"]["tasks"]), result.get("protocol", "likelihood")
        groups.setdefault(key, []).append((path, result))
    tables = [lab_table(*key, found) for key, found in groups.items()]
    return [f"## Single runs\n\n{textwrap.fill(SINGLE_RUNS, WIDTH)}\n", *tables] if tables else []


def lab_table(tasks: str, protocol: str, found: list[tuple[Path, dict[str, Any]]]) -> str:
    """Table of the untouched model and each method, task by task, and how each was trained."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for _, result in found:
        for model, by_task in stages(result).items():
            rows |= {(task, model): by_task[task] for task in by_task if task != "all" or len(by_task) > 2}
    order = list(dict.fromkeys(task for task, _ in rows))
    lines = sorted(rows.items(), key=lambda line: (order.index(line[0][0]), line[0][1] != "untouched", line[0][1]))
    names = [name for name in dict.fromkeys(key for scores in rows.values() for key in scores) if shown(name, rows)]
    cells = [[task, model, *(score(scores, name) for name in names)] for (task, model), scores in lines]
    header = ["task", "model", *(name.replace("_", " ") for name in names)]
    return f"### {tasks}: {protocol}\n\n{table(header, cells)}\n\n{''.join(origin(*one) for one in found)}"


def inspection(path: Path) -> str:
    """Table of means over the layers of each adapter that `smoa inspect` reported on."""
    digits = {"relative_update": 3, "rank": 0, "effective_rank": 0, "coverage": 3}
    rows = []
    for place, layers in json.loads(path.read_text(encoding="utf-8")).items():
        means = [f"{sum(layer[name] for layer in layers) / len(layers):.{count}f}" for name, count in digits.items()]
        trained = sum(layer["parameters"] for layer in layers)
        rows.append([Path(place).name, f"{trained:,}", *means])
    header = ["adapter", "trained", "‖ΔW‖/‖W‖", "rank of ΔW", "effective rank", "coverage"]
    told = f"{textwrap.fill(INSPECTION, WIDTH)}\n\n{table(header, rows)}\n\n[JSON](inspections/{path.name})"
    pictures = sorted(path.parent.glob(f"{path.stem}-*.png"))
    shown = [f"![{one.stem.replace('-', ': ')}, by layer](inspections/{one.name})" for one in pictures]
    return "\n\n".join([f"## {path.stem}: the spectrum", told, *shown]) + "\n"


def stages(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Scores of each model in a file, by task; the model before training is the untouched one."""
    method = str(result["config"]["method"])
    if "evaluation" in result:
        return {{"before": "untouched"}.get(stage, method): scores for stage, scores in result["evaluation"].items()}
    return {method if result.get("adapter") else "untouched": result["scores"]}


def shown(name: str, rows: dict[tuple[str, str], dict[str, Any]]) -> bool:
    return not name.endswith("_stderr") and any(scores.get(name) is not None for scores in rows.values())


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


def score(scores: dict[str, Any], name: str) -> str:
    value, error = scores.get(name), scores.get(f"{name}_stderr")
    if value is None or isinstance(value, int):
        return "–" if value is None else str(value)
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
