"""What `smoa init` knows of a model and data, made up, and rows in a file."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from smoa_lab.budget import budget_choice
from smoa_lab.init import DataFacts, Machine, ModelFacts, Proposal

CONFIG = LlamaConfig(num_hidden_layers=2, hidden_size=32, intermediate_size=64, vocab_size=500, num_attention_heads=2)
MODEL = ModelFacts("some/model", 1_000_000, Counter({(64, 32): 4}), CONFIG)
ROWS = DataFacts({"train": "rows.jsonl", "format": "messages", "test_part": 0.05}, 100, 128, "messages", 5000)
QUESTIONS = DataFacts({"tasks": ["arc_easy"]}, 100, 256)
MACHINE = Machine(10**10)


def proposal(**changes: Any) -> Proposal:
    """Batches of four rows in float32; `changes` are laid over it."""
    chosen = {"model": MODEL, "data": ROWS, "machine": MACHINE, "dtype": "float32", "rows": 4, "checkpointing": False}
    choice = budget_choice(MODEL.shapes, MODEL.parameters, "lora:8")
    return Proposal(**{"choice": choice, **chosen, **changes})


def talks(number: int) -> list[dict[str, Any]]:
    """Rows of two turns, every one different and a little longer."""
    return [
        {"messages": [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": f"{i}." * (i + 1)}]}
        for i in range(number)
    ]


def rows_file(file: Path, rows: list[dict[str, Any]]) -> Path:
    """JSON lines."""
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file
