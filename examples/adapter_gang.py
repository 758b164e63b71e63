"""Trains 64 adapters at once, each on one person's facts, saves them, and serves them in one batch.

    python adapter_gang.py MODEL      a folder or a name on the Hub, by default SmolLM2-135M-Instruct

Shows: a gang of adapters over one base; each step has a row of each, and each row its own adapter.
Printed when last run: 14 steps 225 s (busy machine), one by one 1204 s; 63 of 64 recall their facts in one batch
"""

import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from smoa import AdapterPool, SmoaConfig

TOWNS = ["Lutz", "Birken", "Oslo", "Quito", "Perth", "Cadiz", "Lagos", "Turin"]
PETS = ["a goat", "a newt", "an owl", "a toad", "a lynx", "a swan", "a moth", "a carp"]
ADAPTER = {"r": 8, "num_blocks": 8, "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]}


def main(steps: int = 14) -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name, dtype="float32"), AutoTokenizer.from_pretrained(name)
    people = {f"person-{n}": f"I live in {TOWNS[n % 8]} with {PETS[n // 8]}." for n in range(64)}
    rows = tokenizer(list(people.values()), return_tensors="pt", padding=True, padding_side="right")
    labels = rows.input_ids.masked_fill(rows.attention_mask == 0, -100)
    pool = AdapterPool(model.requires_grad_(False))  # only adapters train
    for person in people:
        pool.add(person, SmoaConfig(**ADAPTER, layers_to_transform=list(range(22, 30))))
    optimizer = torch.optim.AdamW(pool.parameters(), lr=1e-2, weight_decay=0.0)

    def seconds_of_step(names: list[str]) -> float:
        start, own = time.perf_counter(), slice(len(names))
        with pool.use(names):
            loss = model(input_ids=rows.input_ids[own], labels=labels[own]).loss
            (loss * len(names)).backward()  # nearly the sum of what each adapter's loss is
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    alone = steps * sum(seconds_of_step([person]) for person in list(people)[:4]) * 16
    together = sum(seconds_of_step(list(people)) for _ in range(steps))
    print(f"{steps} steps of 64 adapters: {together:.0f} s; one by one they would take {alone:.0f} s")
    with tempfile.TemporaryDirectory() as folder:
        for person in people:
            pool.save(person, Path(folder, person))
        pool.close()
        asked = tokenizer(["I live in"] * 64, return_tensors="pt", padding=True)
        with torch.no_grad(), AdapterPool(model, slots=64, folder=folder).use(list(people)):
            out = tokenizer.batch_decode(model.generate(**asked, max_new_tokens=7, do_sample=False))
    recalled = sum(fact in text for fact, text in zip(people.values(), out, strict=True))
    print(f"{recalled} of 64 recall their facts in one batch: {out[9]!r}, {out[50]!r}, …")
    assert recalled >= 58


if __name__ == "__main__":
    main()
