"""Writes the shorter problems of GSM8K as rows, those of at most 300 characters with their solution: of the published
training part 500 to train on and 100 to choose rates by, drawn by a seed; what is left of it and the published test
part are held out.

    python studies/gsm8k/problems.py FOLDER gsm8k.jsonl    # FOLDER has gsm8k_train.jsonl.gz and gsm8k_test.jsonl.gz
"""

import gzip
import json
import random
import sys
from pathlib import Path

LONGEST, TRAIN, VALIDATION = 300, 500, 100


def shorter(file: Path) -> list[dict[str, str]]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [row for row in rows if len(row["question"]) + len(row["answer"]) <= LONGEST]


folder = Path(sys.argv[1])
rows = shorter(folder / "gsm8k_train.jsonl.gz")
random.Random(0).shuffle(rows)
parts = {
    "train": rows[:TRAIN],
    "validation": rows[TRAIN : TRAIN + VALIDATION],
    "test": rows[TRAIN + VALIDATION :] + shorter(folder / "gsm8k_test.jsonl.gz"),
}
with Path(sys.argv[2]).open("w", encoding="utf-8") as file:
    for part, its in parts.items():
        for row in its:
            kept = {"prompt": f"Question: {row['question']}\nAnswer:", "completion": f" {row['answer']}", "part": part}
            file.write(json.dumps(kept) + "\n")
