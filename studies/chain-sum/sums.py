"""Writes sums as rows, such as "98 + 93 - 77 =": two or three numbers of one or two digits, no sum twice.

    pip install reasoning-gym    # 0.1.25 made the stored study's
    python studies/chain-sum/sums.py chain-sum.jsonl

A line has the sum as prompt, the result as completion, and its part.
"""

import json
import sys
from pathlib import Path

import reasoning_gym

SIZES = {"test": 1_000, "validation": 200, "train": 2_400}
SEEDS = {"test": 1_000_000, "validation": 2_000_000, "train": 3_000_000}  # item i is made of the seed + i
SUMS = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}

seen = set[str]()
with Path(sys.argv[1]).open("w", encoding="utf-8") as file:
    for part, size in SIZES.items():
        sums = iter(reasoning_gym.create_dataset("chain_sum", size=10 * size, seed=SEEDS[part], **SUMS))
        rows = 0
        while rows < size:
            item = next(sums)
            expression = item["metadata"]["expression"]
            if expression in seen:
                continue
            seen.add(expression)
            row = {"prompt": f"{expression} =", "completion": f" {item['answer']}", "part": part}
            file.write(json.dumps(row) + "\n")
            rows += 1
