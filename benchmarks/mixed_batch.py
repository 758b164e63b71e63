"""Compares one batch for several adapters (`adapter_names`) with running the adapters in turn.

    python benchmarks/mixed_batch.py

The model is Gemma 3 270M in float32. Samples are split evenly over the adapters and the base model. Routes, timed in
turn in one process: `mixed` is one forward with `adapter_names`; `in_turn` is a forward for each adapter on its own
samples, switching included; `one` runs the whole batch with one adapter, and `base` with none. Each is timed for a
prompt and for a single token, as in decoding. Writes benchmarks/results/mixed_batch.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from _common import GEMMA_TARGETS, busy_elsewhere, interleaved, pick_device, provenance, write_results
from _gemma import gemma
from _layers import lower_quartile
from torch import Tensor

from smoa import SmoaConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=3)
    parser.add_argument("--each", type=int, default=2, help="samples of each adapter, and of the base")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--r", type=int, default=32)
    parser.add_argument("--num-blocks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    torch.manual_seed(0)
    model = adapted_gemma(arguments, device)
    names = [*model.peft_config, "__base__"]
    others = busy_elsewhere()
    measured = {
        str(tokens): compare(model, names, tokens, arguments.each, arguments.repeats, device)
        for tokens in (arguments.prompt, 1)
    }
    content = {"config": vars(arguments), "by_tokens": measured, "cores_busy_elsewhere": others()}
    print(write_results("mixed_batch", {**content, "provenance": provenance(device)}))


def adapted_gemma(arguments: argparse.Namespace, device: torch.device) -> Any:
    """Gemma with random adapters, each with its own partition."""
    model: Any = gemma("smoa", arguments.r, arguments.num_blocks, device).eval()
    for number in range(1, arguments.adapters):
        config = SmoaConfig(
            r=arguments.r,
            num_blocks=arguments.num_blocks,
            target_modules=list(GEMMA_TARGETS),
            partition="random",
            init_weights=False,
        )
        model.add_adapter(f"adapter {number}", config)
    return model.eval()


def routes(model: Any, names: list[str], tokens: Tensor, each: int) -> dict[str, Callable[[], Tensor]]:
    """Functions that return the logits of the last token, (samples, vocabulary), by route."""
    parts = dict(zip(names, tokens.split(each), strict=True))
    per_sample = [name for name in names for _ in range(each)]

    def forward(batch: Tensor, **options: Any) -> Tensor:
        logits: Tensor = model(input_ids=batch, logits_to_keep=1, use_cache=False, **options).logits[:, -1]
        return logits

    def under(name: str, batch: Tensor) -> Tensor:
        if name == "__base__":
            with model.disable_adapter():
                return forward(batch)
        if name not in model.active_adapters:
            model.set_adapter(name)
        return forward(batch)

    return {
        "mixed": lambda: forward(tokens, adapter_names=per_sample),
        "in_turn": lambda: torch.cat([under(name, part) for name, part in parts.items()]),
        "one": lambda: under(names[0], tokens),
        "base": lambda: under("__base__", tokens),
    }


@torch.inference_mode()
def compare(model: Any, names: list[str], length: int, each: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """Times of every route for one length, and the largest relative difference of logits, `mixed` to `in_turn`."""
    tokens = torch.randint(10, 200_000, (len(names) * each, length), device=device)
    run = routes(model, names, tokens, each)
    alone = run["in_turn"]()
    difference = (run["mixed"]() - alone).abs().max() / alone.abs().max()
    interleaved(run, 1, device)
    times = interleaved(run, repeats, device)
    quickest = {name: lower_quartile(values) for name, values in times.items()}
    ratio = {name: value / quickest["in_turn"] for name, value in quickest.items()}
    print(f"{len(tokens)} x {length} tokens: " + ", ".join(f"{n} {quickest[n]:.3f} s ({ratio[n]:.2f})" for n in run))
    return {"seconds": times, "ratio_to_in_turn": ratio, "largest_relative_difference": float(difference)}


if __name__ == "__main__":
    main()
