"""Writes the README.md of a run's adapter: base, results before and after, data, settings, versions, how to load it."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig

from smoa.files.adapter_card import adapter_card
from smoa.files.named_base import NamedBase
from smoa_lab.config.yaml_text import to_yaml
from smoa_lab.drawing.markdown_tables import markdown_table
from smoa_lab.training.samples import samples_text

SECTIONS = """{results}{data}

## Run

Trained by `smoa train`{commit}, {steps} steps in {seconds:.0f} s on {device}, with {versions}.

```yaml
{config}```

"""


def run_card(title: str, config: PeftConfig, base: NamedBase, metrics: dict[str, Any]) -> str:
    """The card as Markdown; ``config`` is the adapter's as saved, ``metrics`` the run's."""
    return adapter_card(title, config, {}, base, _sections(metrics))


def _sections(metrics: dict[str, Any]) -> str:
    origin, training = metrics["provenance"], metrics["training"]
    return SECTIONS.format(
        results=_results(metrics["evaluation"]) + _forgotten(metrics["forgetting"]) + _samples(metrics["samples"]),
        data=_questions(metrics) if "tasks" in metrics["data"] else _rows(metrics["data"]),
        commit=f" (commit {origin['commit'][:12]}{', changed' * origin['dirty']})" if origin["commit"] else "",
        steps=training["steps"],
        seconds=training["seconds"],
        device=origin["device"],
        versions=", ".join(f"{name} {version}" for name, version in origin["versions"].items() if version),
        config=to_yaml({key: value for key, value in metrics["config"].items() if key != "adapter"}),
    )


def _results(evaluation: dict[str, Any]) -> str:
    """Loss and accuracy per task, or loss and perplexity of rows; nothing if nothing was held out."""
    stages = [evaluation[stage] for stage in ("before", "after") if stage in evaluation]
    if not stages:
        return ""
    of_rows = "rows" in stages[-1]["all"]
    what, columns = ("rows", ("loss", "perplexity")) if of_rows else ("questions", ("gold_loss", "accuracy"))
    rows = [
        (*([] if of_rows else [name]), scores[what], *(_change(stages, name, score) for score in columns))
        for name, scores in stages[-1].items()
    ]
    before = "before → after training" if len(stages) == 2 else "after training"
    tokens = "trained token" if of_rows else "token of the gold answers"
    header = (*([] if of_rows else ["task"]), what, "loss", columns[1])
    table = markdown_table(header, rows, ["---"] * len(header))
    return f"## Results\n\nOn held-out {what}, {before}; the loss is in nats per {tokens}.\n\n{table}\n\n"


def _forgotten(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    return (
        f"Forgotten: {found['change']:+.3f} ± {found['stderr']:.3f} nats per token of general text "
        f"({found['before']:.3f} → {found['after']:.3f}, {found['tokens']:,} tokens of {found['text']}).\n\n"
    )


def _samples(samples: list[dict[str, str]]) -> str:
    """The first two answers before and after."""
    return f"## Samples\n\n{samples_text(samples[:2], level=3)}" if samples else ""


def _questions(metrics: dict[str, Any]) -> str:
    used = metrics["data"]["used"]
    counts = ", ".join(f"{used[part]['examples']:,} {part}" for part in used if used[part]["examples"])
    drawn = f"{counts} questions, drawn with seed {metrics['config']['data']['seed']} from:"
    return f"## Data\n\n{drawn}\n\n{_tasks(metrics['data']['tasks'])}"


def _rows(account: dict[str, Any]) -> str:
    parts = ", ".join(f"{number:,} {part}" for part, number in account["parts"].items())
    tokens = account["tokens"]
    return (
        f"## Data\n\n`{account['source']}`, in the format {account['format']}: {parts} rows; "
        f"{tokens['total']:,} tokens, {account['trained_tokens']:,} of them trained; "
        f"{account['cut']:,} rows cut at {account['max_length']} tokens"
    )


def _change(stages: list[dict[str, Any]], task: str, score: str) -> str:
    return " → ".join(f"{stage[task][score]:.3f}" for stage in stages)


def _tasks(account: dict[str, Any]) -> str:
    rows = [
        (name, task["source"], *(f"{task[part]:,}" for part in ("train", "validation", "test")))
        for name, task in account.items()
    ]
    return markdown_table(("task", "source", "train", "validation", "test"), rows, ["---"] * 5)
