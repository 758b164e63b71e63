"""Compares a training step of Gemma 3 270M with SMoA and with PEFT's LoRA.

    python benchmarks/model_step.py

Both train as many parameters, in float32. A step is forward, loss on the answers, backward and AdamW's update, for 16
examples of 64 tokens, the last 16 of them the answer. Steps are timed in turn in one process. Peak resident memory
during steps is measured in a process of its own for each method. Writes benchmarks/results/model_step.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from _common import busy_elsewhere, interleaved, pick_device, provenance, write_results
from _gemma import gemma
from _layers import lower_quartile, trainable
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from smoa_lab.data.encoding import IGNORED
from smoa_lab.scoring.losses import answer_logits, answer_positions, logits_at

BARS = {"time": 1.15, "memory": 1.03}


def example_batch(arguments: argparse.Namespace, device: torch.device) -> dict[str, Tensor]:
    tokens = torch.randint(10, 200_000, (arguments.batch, arguments.tokens), device=device)
    labels = tokens.clone()
    labels[:, : -arguments.answer] = IGNORED
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


def training_step(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    labels = batch["labels"]
    model.train()

    def step() -> None:
        with logits_at(model, answer_positions(labels)):
            outputs = model(**inputs)
        cross_entropy(answer_logits(outputs.logits, labels), labels[labels != IGNORED]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_memory(method: str, arguments: argparse.Namespace, device: torch.device) -> int:
    """Peak resident bytes of this process during steps (device memory on a GPU)."""
    step = training_step(gemma(method, arguments.r, arguments.num_blocks, device), example_batch(arguments, device))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak to the current value
    for _ in range(4):
        step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def measured_apart(method: str) -> int:
    command = [sys.executable, __file__, *sys.argv[1:], "--only-memory-of", method]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(json.loads(finished.stdout.strip().splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--answer", type=int, default=16, help="tokens of the answer, at the end")
    parser.add_argument("--r", type=int, default=32)
    parser.add_argument("--num-blocks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only-memory-of", choices=("smoa", "lora"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    torch.manual_seed(0)
    if arguments.only_memory_of:
        print(json.dumps(peak_memory(arguments.only_memory_of, arguments, device)))
        return
    models = {name: gemma(name, arguments.r, arguments.num_blocks, device) for name in ("smoa", "lora")}
    batch = example_batch(arguments, device)
    steps = {name: training_step(model, batch) for name, model in models.items()}
    interleaved(steps, 1, device)
    others = busy_elsewhere()
    times = interleaved(steps, arguments.repeats, device)
    result = {
        "config": vars(arguments),
        "bars": BARS,
        "trainable": {name: trainable(model) for name, model in models.items()},
        "seconds": times,
        "ratio": lower_quartile(times["smoa"]) / lower_quartile(times["lora"]),
        "ratio_of_fastest": min(times["smoa"]) / min(times["lora"]),
        "cores_busy_elsewhere": others(),
    }
    del models, steps
    memory = {name: measured_apart(name) for name in ("smoa", "lora")}
    result |= {"peak_bytes": memory, "memory_ratio": memory["smoa"] / memory["lora"], "provenance": provenance(device)}
    print({key: result[key] for key in ("trainable", "ratio", "ratio_of_fastest", "peak_bytes", "memory_ratio")})
    print({name: round(lower_quartile(values), 3) for name, values in times.items()}, result["cores_busy_elsewhere"])
    print(write_results("model_step", result))


if __name__ == "__main__":
    main()
