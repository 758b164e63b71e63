"""Measures transformers' continuous batching with an adapter for each request, beside the base model.

    python benchmarks/batching.py

32 requests of SmolLM2 in bfloat16 on two threads, prompts of 16 tokens, adapters of r = 8 with 8 blocks on all linear
layers. A step that gives each request a token: what 20 tokens take beyond 4, by 16, as a median of runs in turn. Writes
benchmarks/results/batching.json.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial

import torch
from _common import busy_elsewhere, pick_device, provenance, write_results
from fleet import ADAPTERS, TARGETS, interleaved
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from smoa import AdapterPool, SmoaConfig
from smoa_lab.base_models import unpacked_folder
from smoa_lab.serving.batching import running
from smoa_lab.serving.server import PAGE, STEP

REPEATS = 3
FEW, MANY = 4, 20


def answer(pool: AdapterPool, prompts: Sequence[Sequence[int]], names: Sequence[str], new: int) -> None:
    """Generate so many tokens for each prompt, by its adapter."""
    config = ContinuousBatchingConfig(page_size=PAGE, num_blocks=2 * len(prompts) + 2, max_batch_tokens=STEP)
    with running(pool, GenerationConfig(do_sample=False, eos_token_id=-1), config) as manager:
        for number, (prompt, name) in enumerate(zip(prompts, names, strict=True)):
            manager.add_request(prompt, str(number), max_new_tokens=new, adapter=name)
        for _ in prompts:
            manager.get_result()


def main() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    others = busy_elsewhere()
    model = AutoModelForCausalLM.from_pretrained(unpacked_folder("smollm2-135m"), dtype=torch.bfloat16).eval()
    pool, names = AdapterPool(model), [str(number) for number in range(ADAPTERS)]
    for name in names:
        pool.add(name, SmoaConfig(r=8, num_blocks=8, target_modules=TARGETS, init_weights=False))
    prompts = torch.randint(10, 500, (ADAPTERS, 16)).tolist()
    adapters = {"base": ["__base__"] * ADAPTERS, "an adapter for each": names}
    runs = {
        (kind, new): partial(answer, pool, prompts, of, new) for kind, of in adapters.items() for new in (FEW, MANY)
    }
    medians = {case: statistics.median(times) for case, times in interleaved(runs, REPEATS).items()}
    steps = {kind: (medians[kind, MANY] - medians[kind, FEW]) / (MANY - FEW) for kind in adapters}
    found = {"seconds": steps, "ratio": round(steps["an adapter for each"] / steps["base"], 3)}
    content = {"step of 32 requests": found, "cores_busy_elsewhere": others()}
    print(found, write_results("batching", content | {"provenance": provenance(pick_device("cpu"))}))


if __name__ == "__main__":
    main()
