"""Measures vLLM with SMoA adapters, beside its own LoRA and the base model, in one engine on a CPU.

    OMP_NUM_THREADS=1 python benchmarks/vllm_serving.py vllm_serving --threads 1

In the environment of `make serve-test`, with SmolLM2 135M unpacked. The engine holds three times 32 adapters of all
linear layers: LoRA of r = 8, SMoA of r = 8 and of r = 64 with eight spectral blocks (an eighth of LoRA's parameters,
and as many). A decoding step is measured on 1, 8 and 32 requests with as many adapters, as the time of 1 + `tokens`
tokens less that of one; prefill on 32 prompts of 16 tokens. All are taken in turn. With one thread the times are of the
CPU, so that other processes hardly change them. Writes benchmarks/results/vllm_serving.json.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from _common import interleaved, lower_quartile, run
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from smoa import SmoaConfig

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BASE = Path(os.environ.get("SMOA_CACHE", "~/.cache/smoa")).expanduser() / "models" / "smollm2-135m"
ADAPTERS = 32
BATCHES = 1, 8, ADAPTERS
PROMPT = 16
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


def configs() -> dict[str, Any]:
    smoa: dict[str, Any] = {"num_blocks": 8, "target_modules": TARGETS, "init_weights": False}
    lora = LoraConfig(r=8, target_modules=TARGETS, init_lora_weights=False)
    return {"lora 8": lora, "smoa 8": SmoaConfig(r=8, **smoa), "smoa 64": SmoaConfig(r=64, **smoa)}


def vllm_serving(device: torch.device, dtype: str = "bfloat16", tokens: int = 16, repeats: int = 5) -> dict[str, Any]:
    """Seconds of a decoding step and of prefill of each method at each batch size."""
    os.environ.update(ENVIRONMENT)
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    with tempfile.TemporaryDirectory() as room:
        for name, config in configs().items():
            model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), config)
            folder = f"{room}/{name}"
            model.save_pretrained(folder)
            del model
        engine = LLM(
            str(BASE), dtype=dtype, enforce_eager=True, max_model_len=256, max_num_seqs=ADAPTERS, seed=0,
            enable_lora=True, max_loras=3 * ADAPTERS + 1, max_lora_rank=8,
            enable_prefix_caching=False, skip_tokenizer_init=True,
        )  # fmt: skip
        requests: dict[str, list[Any]] = {"base": [None] * ADAPTERS}
        for number, name in enumerate(configs()):  # the same weights under 32 names: vLLM and smoa know no better
            first = number * ADAPTERS + 1
            requests[name] = [LoRARequest(f"{name} {i}", first + i, f"{room}/{name}") for i in range(ADAPTERS)]
            for request in requests[name]:
                engine.llm_engine.add_lora(request)
        rng = random.Random(0)
        prompts: Any = [
            {"prompt_token_ids": [rng.randrange(5, 40_000) for _ in range(PROMPT)]} for _ in range(ADAPTERS)
        ]

        def generates(name: str, batch: int, length: int) -> Callable[[], object]:
            sampling = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
            loras = requests[name][:batch]
            return lambda: engine.generate(prompts[:batch], sampling, lora_request=loras, use_tqdm=False)

        cases = {
            f"{name}, {batch}, {length}": generates(name, batch, length)
            for name in requests
            for batch in BATCHES
            for length in (1, 1 + tokens)
        }
        for case in cases.values():
            case()
        times = interleaved(cases, repeats)
    found: dict[str, dict[str, float]] = {}
    for name in requests:
        of = {batch: [lower_quartile(times[f"{name}, {batch}, {n}"]) for n in (1, 1 + tokens)] for batch in BATCHES}
        found[name] = {f"step of {batch}": (long - short) / tokens for batch, (short, long) in of.items()}
        found[name][f"prefill of {ADAPTERS}"] = of[ADAPTERS][0]
    return {"seconds": found, "vllm": version("vllm-cpu"), "base": BASE.name, "seed": 0}


if __name__ == "__main__":
    run(__doc__, vllm_serving=vllm_serving)
