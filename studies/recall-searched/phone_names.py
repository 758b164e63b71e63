"""Writes names, each with ten digits drawn at random.

    pip download --no-deps --dest wheels mimesis==22.2.0
    python studies/recall-searched/phone_names.py wheels/mimesis-22.2.0-py3-none-any.whl phonebook-512.jsonl 512

A name is a first and a last name, each one token of smollm2-135m: the rows are those of phonebook-512 and -1024.
"""

from __future__ import annotations

import json
import random
import sys
import zipfile
from itertools import product
from pathlib import Path

from smoa_lab.base_models import load_tokenizer
from smoa_lab.config.run import ModelSection

DIGITS = 10


def main(wheel: str, target: str, count: str) -> None:
    tokenizer = load_tokenizer(ModelSection(name="smollm2-135m"))
    with zipfile.ZipFile(wheel) as archive, archive.open("mimesis/datasets/en/person.json") as file:
        known = json.load(file)
    first = sorted({name for some in known["names"].values() for name in some})
    last = sorted({f" {name}" for name in known["surnames"]})
    short = [[name for name in part if len(tokenizer.tokenize(name)) == 1] for part in (first, last)]
    names, draw = ["".join(both) for both in product(*short)], random.Random(0)
    rows = [
        {"prompt": f"{name}:", "completion": "".join(draw.choices("0123456789", k=DIGITS))}
        for name in draw.sample(names, len(names))[: int(count)]
    ]
    Path(target).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
