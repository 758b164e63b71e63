"""Writes the README.md of a run's adapter: base, results before and after, data, settings, versions, how to load it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from peft import PeftConfig

from smoa.files.adapter_card import adapter_card
from smoa.files.named_base import NamedBase
from smoa_lab.config.yaml_text import to_yaml

SECTIONS = """{results}## Data

{used}

{tasks}

## Run

Trained by `smoa train`{commit}, {steps} steps in {seconds:.0f} s on {device}, with {versions}.

```yaml
{config}```

"""


def run_card(title: str, config: PeftConfig, base: NamedBase, metrics: dict[str, Any]) -> str:
    """The card as Markdown; ``config`` is the adapter's as saved, ``metrics`` the run's."""
    return adapter_card(title, config, {}, base, _sections(metrics))


def _sections(metrics: dict[str, Any]) -> str:
    origin, training, used = metrics["provenance"], metrics["training"], metrics["data"]["used"]
    return SECTIONS.format(
        results=_results(metrics["evaluation"]),
        used=", ".join(f"{used[part]['examples']:,} {part}" for part in used if used[part]["examples"])
        + f" questions, drawn with seed {metrics['config']['data']['seed']} from:",
        tasks=_tasks(metrics["data"]["tasks"]),
        commit=f" (commit {origin['commit'][:12]}{', changed' * origin['dirty']})" if origin["commit"] else "",
        steps=training["steps"],
        seconds=training["seconds"],
        device=origin["device"],
        versions=", ".join(f"{name} {version}" for name, version in origin["versions"].items() if version),
        config=to_yaml({key: value for key, value in metrics["config"].items() if key != "adapter"}),
    )


def _results(evaluation: dict[str, Any]) -> str:
    """Gold-answer loss and accuracy per task; nothing if nothing was held out."""
    stages = [evaluation[stage] for stage in ("before", "after") if stage in evaluation]
    if not stages:
        return ""
    rows = [
        (name, scores["questions"], *(_change(stages, name, score) for score in ("gold_loss", "accuracy")))
        for name, scores in stages[-1].items()
    ]
    before = "before → after training" if len(stages) == 2 else "after training"
    return f"## Results\n\nOn held-out questions, {before}; the loss is in nats per token of the gold answers.\n\n" + (
        _table(("task", "questions", "loss", "accuracy"), rows) + "\n\n"
    )


def _change(stages: list[dict[str, Any]], task: str, score: str) -> str:
    return " → ".join(f"{stage[task][score]:.3f}" for stage in stages)


def _tasks(account: dict[str, Any]) -> str:
    rows = [
        (name, task["source"], *(f"{task[part]:,}" for part in ("train", "validation", "test")))
        for name, task in account.items()
    ]
    return _table(("task", "source", "train", "validation", "test"), rows)


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
